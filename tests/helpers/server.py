"""A real HTTP server on loopback that speaks Perspective's and OpenAI's protocols, and misbehaves on command.

    with Server() as server:
        server.plan("text 7", "503", "reset")     # what the next questions about this text get
        Perspective(endpoint=server.perspective)  # the score of "text 7" is 0.07, the judge's rating 7
        server.count["text 7"], server.times, server.headers, server.bodies, server.most_at_once

A fault is a status ("503"), a status with Retry-After ("429 retry 1"), a status with a body of its own (`(400, {…})`),
a 200 with a body of its own (bytes), "reset" and "truncated" (in mid-body), or "hang" (until the server stops).
"""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter, defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANY = "*"  # plans what questions about any text get


class Server(ThreadingHTTPServer):
    """Counts and times what it is asked; `delay` makes every answer take so many seconds."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.server_address[1]
        self.perspective = f"http://127.0.0.1:{self.port}/v1alpha1/comments:analyze"
        self.openai = f"http://127.0.0.1:{self.port}/v1"
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.faults = defaultdict(deque)
        self.replies = {}  # text -> what the judge says, in place of {"score": N}
        self.refused_fields = {}  # field of a request -> the status and the body of the answer to it
        self.delay = 0.0
        self.count, self.times, self.headers, self.bodies = Counter(), [], [], []
        self.at_once = self.most_at_once = 0

    def plan(self, text, *faults):
        self.faults[text].extend(faults)

    def start(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self):
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def handle_error(self, request, client_address):
        """A client that has gone is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True

    def do_POST(self):
        server, arrived = self.server, time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.judged = "messages" in body
        text = judged_text(body) if self.judged else body["comment"]["text"]
        with server.lock:
            server.count[text] += 1
            server.times.append(arrived)
            server.headers.append(dict(self.headers))
            server.bodies.append(body)
            server.at_once += 1
            server.most_at_once = max(server.at_once, server.most_at_once)
            queue = server.faults[text] or server.faults[ANY]
            fault = queue.popleft() if queue else None
            fault = next((server.refused_fields[field] for field in body if field in server.refused_fields), fault)
        server.stopping.wait(server.delay)
        with server.lock:
            server.at_once -= 1
        good = self.judgement(text) if self.judged else self.scores(body, text)
        if fault is None:
            self.answer(200, good)
        elif isinstance(fault, tuple):
            self.answer(*fault)
        elif isinstance(fault, bytes):
            self.answer(200, fault)
        elif fault == "hang":
            server.stopping.wait(20)
            self.close_connection = True
        elif fault in ("reset", "truncated"):
            self.break_off(json.dumps(good).encode(), reset=fault == "reset")
        else:
            status, *retry = fault.split(" retry ")
            headers = {"Retry-After": retry[0]} if retry else {}
            self.answer(int(status), {"error": {"code": int(status), "message": "no luck"}}, headers)

    def scores(self, body, text):
        scores = {}
        for attribute in body["requestedAttributes"]:
            value = {"value": number(text) / 100, "type": "PROBABILITY"}
            scores[attribute] = {"spanScores": [{"begin": 0, "end": 1, "score": value}], "summaryScore": value}
        return {"attributeScores": scores, "languages": body["languages"], "detectedLanguages": ["en"]}

    def judgement(self, text):
        content = self.server.replies.get(text, json.dumps({"score": number(text)}))
        content, reason = content if isinstance(content, tuple) else (content, "stop")
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}
        return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 9}}

    def answer(self, status, body, headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def break_off(self, body, reset):
        """Half a body: the announced length is never reached."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if reset:  # closing with nothing left to linger for sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_):
        """Says nothing: the tests' output is for the tests."""


def number(text):
    """The last number in a text: "text 42" scores 0.42, or is rated 42."""
    found = re.findall(r"[0-9]+", text)
    return int(found[-1]) if found else 0


def judged_text(body):
    """What stands between the marks of the question to a judge."""
    content = body["messages"][-1]["content"]
    mark = re.search(r"<(text-[0-9a-f]+)>", content)[1]
    return content.split(f"<{mark}>", 1)[1].rsplit(f"</{mark}>", 1)[0]
