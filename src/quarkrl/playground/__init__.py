"""A model as a local web page: the same prompt before training, and at its best and worst quantile, with scores."""
