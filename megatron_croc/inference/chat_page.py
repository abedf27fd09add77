"""Web server of `croc chat --web`: one HTML page and an HTTP interface for this machine only.

    GET /       the page
    POST /new   -> {"id"}: a new conversation
    POST /ask   form: id, text, images -> lines of JSON: {"piece"} ..., {"end": true, "is_finished"}

The socket is bound to 127.0.0.1. Requests for another host name (DNS rebinding) and posts that do
not come from the page itself (cross-site requests) are refused. Uploads stay in memory.
"""

import io
import json
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from megatron_croc.errors import ConfigError, CrocError
from megatron_croc.inference.chat import Conversation
from megatron_croc.inference.chat_html import PAGE
from megatron_croc.inference.generation import Generator, Sampling

try:
    import flask
    from werkzeug.exceptions import HTTPException
    from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler
except ImportError as error:
    raise ConfigError(
        "croc chat --web needs flask: pip install 'megatron-croc[chat]', or leave --web out"
    ) from error

LOOPBACK = "127.0.0.1"
MAX_UPLOAD_BYTES = 32 * 2**20
"""Largest request, including images."""

WAIT_SECONDS = 30
"""Longest wait for a running answer; a stopped answer ends at its next piece of text."""

MAX_CONVERSATIONS = 16
"""Largest number of conversations; the least recently used one is dropped."""


ENDING = "croc_ending"
"""Key in app.extensions of the event that stops running answers when the server ends."""


class _Request(flask.Request):
    """A request whose uploads stay in memory; the default writes large ones to a temporary file."""

    def _get_file_stream(self, *_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO()


class _App(flask.Flask):
    request_class = _Request


class _QuietHandler(WSGIRequestHandler):
    def log_request(self, *_: Any, **__: Any) -> None: ...


class _Server(ThreadedWSGIServer):
    daemon_threads = False  # a daemon thread that computes at interpreter exit aborts the process


def build_app(generator: Generator, sampling: Sampling) -> flask.Flask:
    """Build the WSGI application. It computes one answer at a time."""
    app = _App(__name__)
    app.config.update(MAX_CONTENT_LENGTH=MAX_UPLOAD_BYTES, TRUSTED_HOSTS=[LOOPBACK, "localhost"])
    conversations: OrderedDict[str, Conversation] = OrderedDict()
    changing, computing = threading.Lock(), threading.Lock()
    ending = app.extensions[ENDING] = threading.Event()

    @app.before_request
    def refuse_other_sites() -> None:
        request = flask.request
        if request.method != "POST":
            return
        if request.headers.get("Origin") != request.host_url.rstrip("/"):
            flask.abort(403, "the request does not come from this page")

    @app.after_request
    def protect(response: flask.Response) -> flask.Response:
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "img-src blob: data:; connect-src 'self'; frame-ancestors 'none'; form-action 'none'; "
            "base-uri 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.errorhandler(HTTPException)
    def as_json(error: HTTPException) -> tuple[dict, int]:
        limit = f"; a request may have {MAX_UPLOAD_BYTES >> 20} MiB: choose smaller images"
        return {
            "error": f"{error.description}{limit if error.code == 413 else ''}"
        }, error.code or 500

    @app.errorhandler(CrocError)
    def as_fault(error: CrocError) -> tuple[dict, int]:
        return {"error": str(error)}, 400

    @app.get("/")
    def page() -> str:
        return PAGE.replace("MAX_UPLOAD_MIB", str(MAX_UPLOAD_BYTES >> 20))

    @app.post("/new")
    def new() -> dict:
        name = secrets.token_urlsafe(16)
        with changing:
            conversations[name] = Conversation(generator, sampling)
            if len(conversations) > MAX_CONVERSATIONS:
                conversations.popitem(last=False)
        return {"id": name}

    @app.post("/ask")
    def ask() -> flask.Response:
        request = flask.request
        with changing:
            conversation = conversations.get(request.form.get("id", ""))
            if conversation is None:
                flask.abort(404, "this conversation is no longer known: reset it")
            conversations.move_to_end(request.form["id"])
        if not computing.acquire(timeout=WAIT_SECONDS):
            flask.abort(409, "another answer is being computed: wait for its end, or stop it")
        try:
            conversation.waiting = []
            for upload in request.files.getlist("images"):
                conversation.add_image(upload.filename or "image", upload.read())
            pieces = conversation.ask(request.form.get("text", ""))
        except BaseException:
            computing.release()
            raise

        def lines() -> Iterator[str]:
            try:
                with closing(pieces):
                    for piece in pieces:
                        yield json.dumps({"piece": piece}) + "\n"
                        if ending.is_set():
                            break
                yield json.dumps({"end": True, "is_finished": conversation.is_finished}) + "\n"
            except CrocError as error:
                yield json.dumps({"error": str(error)}) + "\n"

        response = flask.Response(lines(), mimetype="application/x-ndjson")
        response.call_on_close(pieces.close)
        response.call_on_close(computing.release)
        return response

    return app


def listen(port: int) -> socket.socket:
    """Open a listening socket on the loopback address.

    Raises:
        ConfigError: the port is taken or needs more rights.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"port {port}: {error.strerror}: choose another with --port (0: any free one)"
        ) from error
    return listening


def serve(app: flask.Flask, listening: socket.socket) -> None:
    """Serve the page until Ctrl-C."""
    port = listening.getsockname()[1]
    server = _Server(LOOPBACK, port, app, handler=_QuietHandler, fd=listening.fileno())
    print(f"http://{LOOPBACK}:{port}/ (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        app.extensions[ENDING].set()
        server.server_close()  # waits for the threads of running requests
        listening.close()
