"""Requests to an endpoint: which addresses are taken, retries with backoff, errors in one line.

The key stands in the header of every request and nowhere else: not in errors, representations or files.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from steer.core import InputError, Samples, SteerError, check
from steer.serving.wire import is_loopback

__all__ = ["Call", "Connection", "EndpointError", "Retry", "base_url", "read_key"]


_SAME_FOR_ALL = (401, 402, 403, 404)
"""Refusals that would meet every other request as well."""

_MOST_BYTES = 256 << 20
"""Answers longer than this are not read."""


class EndpointError(SteerError):
    """An endpoint refused, or kept failing.

    `status` is the HTTP status, None where no answer came; `param` the field that the endpoint named. `samples` are the
    texts that had been finished, without scores, with `group` numbering the prompts of `samples.prompts`; None where
    nothing had been asked yet.
    """

    def __init__(self, message: str, status: int | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.samples: Samples | None = None


class _Passing(Exception):
    """A failure that another try may not meet, with the seconds to wait that the endpoint asked for."""

    def __init__(self, what: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(what)
        self.what, self.status, self.wait = what, status, wait


@dataclass(frozen=True)
class Retry:
    """Tries after the first, on 408, 429, 5xx, timeouts and dropped connections.

    The wait before try i + 1 is drawn between half of and the whole `first * 2^i` seconds, at most `longest`, and never
    less than the endpoint's Retry-After; one that asks for more than `longest` is not waited for. `sleep` (None: one
    that ends early when the run is given up), `jitter` (uniform in [0, 1)) and `now` (seconds since 1970) can be
    replaced.
    """

    retries: int = 5
    first: float = 0.5
    longest: float = 60.0
    sleep: Callable[[float], object] | None = None
    jitter: Callable[[], float] = random.random
    now: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        whole = isinstance(self.retries, int) and not isinstance(self.retries, bool)
        check(whole and self.retries >= 0, "retries", self.retries, "an integer of 0 or more")
        check(self.first >= 0, "first", self.first, "seconds, 0 or more")
        check(self.longest >= self.first, "longest", self.longest, f"seconds, {self.first} or more")

    def wait(self, tried: int, asked: float | None) -> float | None:
        """Seconds before the next try after `tried` tries, None to give up."""
        if tried > self.retries or (asked is not None and asked > self.longest):
            return None
        backoff = min(self.first * 2.0 ** (tried - 1), self.longest) * (0.5 + 0.5 * self.jitter())
        return backoff if asked is None else max(backoff, asked)

    def asked(self, headers: Any) -> float | None:
        """Seconds to wait of a Retry-After header, a number or a date."""
        given = headers.get("retry-after")
        if given is None:
            return None
        try:
            return max(0.0, float(given))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(given).timestamp() - self.now())
        except ValueError:
            return None


def base_url(url: str, insecure: bool) -> str:
    """The address without its `#fragment` and last slash. Raises `InputError` for one that would send prompts or a key
    in the clear to another machine.
    """
    form = "http://127.0.0.1:8000/v1, or https://host/v1"
    check(isinstance(url, str), "url", url, form)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InputError("url", url, form) from None
    check(
        parts.username is None and parts.password is None,
        "url",
        "an address with a user name or password",
        "one without: a key goes into an environment variable (key_env)",
    )
    check(parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query, "url", url, form)
    check(
        parts.scheme == "https" or insecure or is_loopback(parts.hostname or ""),
        "url",
        url,
        "https for another machine; insecure=True sends prompts and key in the clear",
    )
    return parts._replace(fragment="").geturl().rstrip("/")


def read_key(key_env: str | None) -> str | None:
    """The key in an environment variable. OPENAI_API_KEY may be unset, for endpoints that need none; any other must be
    there.
    """
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    check(bool(key) or key_env == "OPENAI_API_KEY", "key_env", key_env, "an environment variable that is set")
    check(key.isascii() and key.isprintable(), "key_env", key_env, "a key of printable ASCII characters")
    return key or None


def _library() -> Any:
    """httpx, or httpx2, which took its place in newer huggingface_hub; both have the same interface."""
    for name in ("httpx", "httpx2"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise SteerError("an endpoint is asked through httpx, which is not installed: pip install httpx")


@dataclass(frozen=True)
class Call:
    """One POST request: a path below the endpoint's address, and its JSON body."""

    path: str
    body: dict[str, Any]


class Connection:
    """Sends requests to one endpoint, several at once; its sockets are kept open between them."""

    def __init__(self, url: str, key: str | None, retry: Retry, timeout: float, max_concurrency: int) -> None:
        check(isinstance(timeout, int | float) and 0 < timeout < 1e6, "timeout", timeout, "seconds, more than 0")
        whole = isinstance(max_concurrency, int) and max_concurrency >= 1
        check(whole, "max_concurrency", max_concurrency, "an integer of 1 or more")
        self.url, self.retry, self.timeout, self.max_concurrency = url, retry, timeout, max_concurrency
        self._http, self._key = _library(), key
        self._client = self._http.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self._http.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=self._http.Limits(max_connections=max_concurrency),
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
        )

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    def close(self) -> None:
        self._client.close()

    def get(self, path: str) -> Any:
        """The JSON answer to a GET request. Raises `EndpointError`."""
        return self._tried("GET", path, None, threading.Event())

    def post(self, call: Call) -> Any:
        """The JSON answer. Raises `EndpointError`."""
        return self._tried("POST", call.path, call.body, threading.Event())

    def post_all(
        self, calls: Sequence[Call], on_answer: Callable[[int, Any], None] = lambda i, answer: None
    ) -> list[Any]:
        """The JSON answer of every call, or its `EndpointError`. `on_answer(i, answer)` is called in this thread as
        answers come. A refusal that every call would meet (a wrong key, an unknown model) ends those that wait.
        """
        answers: list[Any] = [None] * len(calls)
        stop = threading.Event()
        pool = ThreadPoolExecutor(max(1, min(len(calls), self.max_concurrency)), thread_name_prefix="steer-endpoint")
        futures: dict[Future[Any], int] = {
            pool.submit(self._tried, "POST", call.path, call.body, stop): i for i, call in enumerate(calls)
        }
        try:
            for future in as_completed(futures):
                i = futures[future]
                try:
                    answers[i] = future.result()
                except EndpointError as error:
                    answers[i] = error
                    if error.status in _SAME_FOR_ALL:
                        stop.set()
                else:
                    on_answer(i, answers[i])
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return answers

    def _tried(self, method: str, path: str, body: Any, stop: threading.Event) -> Any:
        tried = 0
        while True:
            if stop.is_set():
                raise EndpointError(f"endpoint {self.url}: not asked: the endpoint refused another request for good")
            tried += 1
            try:
                return self._once(method, path, body)
            except _Passing as failure:
                wait = self.retry.wait(tried, failure.wait)
                if wait is None:
                    asked = "" if failure.wait is None else f", which asks to wait {failure.wait:g} s"
                    times = f"after {tried} tries" if tried > 1 else "at the only try"
                    raise self._error(f"{failure.what}{asked} ({times}, {method} {path})", failure.status) from None
                (self.retry.sleep or stop.wait)(wait)

    def _once(self, method: str, path: str, body: Any) -> Any:
        http = self._http
        try:
            status, headers, content = self._exchange(method, path, body)
        except http.TimeoutException:
            raise _Passing(f"no answer within {self.timeout:g} s") from None
        except (http.NetworkError, http.RemoteProtocolError) as error:
            raise _Passing(f"connection lost: {str(error) or type(error).__name__}") from None
        except http.HTTPError as error:
            raise self._error(f"{type(error).__name__}: {error} ({method} {path})") from None
        if status == 200:
            return self._parsed(content, method, path)
        message, param, code = _said(content)
        what = f"{status} {f'{param}: ' if param and not message.startswith(param) else ''}{message}".rstrip()
        if (status in (408, 429) or status >= 500) and code != "insufficient_quota":
            raise _Passing(what, status, self.retry.asked(headers))
        raise self._error(f"{what} ({method} {path})", status, param)

    def _exchange(self, method: str, path: str, body: Any) -> tuple[int, Any, bytes]:
        """Status, headers and content of one exchange; the whole of it must end within the time limit."""
        began, parts, size = time.monotonic(), [], 0
        with self._client.stream(method, self.url + path, json=body) as response:
            for chunk in response.iter_bytes():
                parts.append(chunk)
                size += len(chunk)
                if size > _MOST_BYTES:
                    raise self._error(f"an answer of more than {_MOST_BYTES >> 20} MiB ({method} {path})")
                if time.monotonic() - began > self.timeout:
                    raise self._http.ReadTimeout("")
            return response.status_code, response.headers, b"".join(parts)

    def _parsed(self, content: bytes, method: str, path: str) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            raise self._error(
                f"an answer that is not JSON ({method} {path}): is this an OpenAI-compatible address "
                "(they mostly end in /v1)?"
            ) from None

    def _error(self, what: str, status: int | None = None, param: str | None = None) -> EndpointError:
        line = " ".join(what.split())
        if self._key:
            line = line.replace(self._key, "***")
        return EndpointError(f"endpoint {self.url}: {line}", status, param)


def _said(content: bytes) -> tuple[str, str | None, str | None]:
    """Message, param and code of an error's body, in the shapes that servers give it."""
    try:
        body = json.loads(content)
    except ValueError:
        return content[:300].decode("utf-8", "replace"), None, None
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)[:500], None, None
    message, param, code = (error.get(name) for name in ("message", "param", "code"))
    if message is None and isinstance(detail := error.get("detail"), list) and detail and isinstance(detail[0], dict):
        message, param = detail[0].get("msg"), ".".join(map(str, detail[0].get("loc", ())))
    if message is None:
        message = error.get("detail", error)
    return str(message)[:500], None if param is None else str(param), None if code is None else str(code)
