"""Responses: their JSON, Retry-After, and which failures are worth a retry."""

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from quarkrl.rewards.functions.response import Response, TransientFailure, json_value, retry_after_seconds


@pytest.mark.parametrize(
    ("status", "is_transient"),
    [(408, True), (425, True), (429, True), (500, True), (503, True), (200, False), (400, False), (404, False)],
)
def test_some_statuses_are_worth_a_retry(status, is_transient):
    response = Response(status, None, b"{}")
    assert response.is_transient_failure == is_transient
    assert response.is_success == (status == 200)
    assert response.is_client_error == (400 <= status < 500)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"a": "\xff\xfe"}', b'{"a": 1', b"[" * 100_000])
def test_a_body_that_is_not_json_is_a_transient_failure(body):
    with pytest.raises(TransientFailure, match="invalid JSON"):
        Response(200, None, body).json()


def test_a_value_is_found_by_its_path_and_a_missing_one_is_named():
    answer = {"choices": [{"message": {"content": "7"}}]}
    assert json_value(answer, "choices", 0, "message", "content") == "7"
    for wrong in ({}, {"choices": []}, {"choices": [7]}, None, 3, []):
        with pytest.raises(TransientFailure, match=r"without choices\.0\.message\.content"):
            json_value(wrong, "choices", 0, "message", "content")


def test_retry_after_is_seconds_or_a_date():
    in_an_hour = format_datetime(datetime.now(timezone.utc) + timedelta(hours=1), usegmt=True)
    assert 3000 < retry_after_seconds(in_an_hour) <= 3600
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [retry_after_seconds(header) for header in (" 120 ", "1.5", "0")] == [120, 1.5, 0]
    for nonsense in (None, "", "soon", "-5", "nan", "inf", "²"):
        assert retry_after_seconds(nonsense) is None
