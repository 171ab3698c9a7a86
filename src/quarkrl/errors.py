"""The one exception that is the user's to mend; the command line turns it into one line and exit code 2."""


class UserError(ValueError):
    """A mistake of the user's, told in one line: what was given, what is wanted, what to do."""
