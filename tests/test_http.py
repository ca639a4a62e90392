# SPDX-License-Identifier: Apache-2.0
"""Room HTTP: requests, responses, and who is asking."""

from __future__ import annotations

import html
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import run

import chasquid
from chasquid import HttpRefused, HttpRequest, Loop, Stream


def read(data: bytes, limit: int = 100) -> tuple[HttpRequest, bytes, bytes]:
    """Return the request in `data`, its body, and what the server said meanwhile."""

    async def main(loop: Loop) -> tuple[HttpRequest, bytes, bytes]:
        ours, theirs = socket.socketpair()
        stream = Stream(loop, ours)
        try:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            request = await chasquid.read_request(stream)
            body = await chasquid.read_body(stream, request, limit)
            await stream.flush()
            theirs.setblocking(False)
            try:
                said = theirs.recv(1000)
            except BlockingIOError:
                said = b""
            return request, body, said
        finally:
            stream.close()
            theirs.close()

    return run(main)


def test_a_request_has_a_path_a_query_headers_and_a_body() -> None:
    head = b"POST /a%20b?x=1&y=?2 HTTP/1.1\r\nHost: Here \r\nX-A:b\r\nCONTENT-LENGTH: 3\r\n\r\n"
    request, body, said = read(head + b"abcd")
    assert request[:3] == ("POST", "/a%20b", "x=1&y=?2")
    assert request.headers == {"host": "Here", "x-a": "b", "content-length": "3"}
    assert (body, said) == (b"abc", b"")


def test_who_waits_to_send_a_body_is_told_to() -> None:
    head = b"POST / HTTP/1.1\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
    assert read(head + b"x")[1:] == (b"x", b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("Transfer-Encoding: chunked", 411),
        ("Content-Length: 1\r\nTransfer-Encoding: chunked", 411),
        ("Content-Length: -1", 400),
        ("Content-Length: 1, 1", 400),
        ("Content-Length: 0x1", 400),
        ("Content-Length: \xb2", 400),
        ("Content-Length:", 400),
        ("Content-Length: 101", 413),
        ("Content-Length: 999999999999999", 413),
    ],
)
def test_a_body_without_a_plain_length_is_refused(line: str, status: int) -> None:
    with pytest.raises(HttpRefused) as refused:
        read(f"POST / HTTP/1.1\r\n{line}\r\n\r\n".encode("latin-1") + b"x" * 200)
    assert refused.value.status == status


def test_a_body_that_is_cut_short_is_none() -> None:
    with pytest.raises(chasquid.Disconnected):
        read(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc")


def test_a_response_has_its_length_in_octets_and_the_policy_that_was_asked_for() -> None:
    head, _, body = chasquid.http_response(
        404, "text/plain", "é", "default-src x", [("X-A", "b\r\nSet-Cookie: evil")]
    ).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 404 Not Found"
    assert "Content-Length: 2" in lines and body == "é".encode()
    assert "Content-Security-Policy: default-src x" in lines
    assert "X-A: b Set-Cookie: evil" in lines
    assert chasquid.without_body(head + b"\r\n\r\n" + body) == head + b"\r\n\r\n"
    endless = chasquid.http_head(200, "text/plain", None)
    assert endless.startswith(b"HTTP/1.1 200 OK\r\n") and b"Content-Length" not in endless


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1:80", True), ("[::1]:80", True), ("::1", True), ("LOCALHOST:1", True),
        ("Mail.here.example", True), ("", True), ("evil.example", False), ("a b", False),
        ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("x:y", False),
    ],
)  # fmt: skip
def test_which_names_are_ours(host: str, ours: bool) -> None:
    assert chasquid.is_our_name(host, "mail.HERE.example") is ours


@pytest.mark.parametrize(
    ("headers", "page", "foreign"),
    [
        ({}, False, False),
        ({"sec-fetch-site": "none"}, False, False),
        ({"sec-fetch-site": "same-origin"}, True, False),
        ({"sec-fetch-site": "same-site"}, True, True),
        ({"sec-fetch-site": "cross-site"}, True, True),
        ({"origin": "http://localhost:80"}, True, False),
        ({"origin": "https://LOCALHOST:80"}, True, False),
        ({"origin": "http://localhost:81"}, True, True),
        ({"origin": "null"}, True, True),
        ({"origin": ""}, True, True),
    ],
)
def test_who_made_a_request(headers: dict[str, str], page: bool, foreign: bool) -> None:
    headers = {"host": "localhost:80", **headers}
    assert chasquid.is_from_a_page(headers) is page
    assert chasquid.is_from_a_foreign_page(headers) is foreign


@given(st.text())
def test_escaped_text_is_the_same_text_and_holds_no_markup(text: str) -> None:
    escaped = chasquid.html_text(text)
    assert not set(escaped) & set("<>\"'")
    if "\0" not in text and "\r" not in text:
        assert html.unescape(escaped.replace("&amp;", "\0")).replace("\0", "&") == text
