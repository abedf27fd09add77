"""The page of `croc chat --web`, over HTTP and in a real browser."""

import http.client
import json
import shutil
import threading
import time

import pytest

flask = pytest.importorskip("flask", reason="the page needs flask")

BOUNDARY = "croc-boundary"


@pytest.fixture(scope="module")
def port(chat_generator):
    from megatron_croc.inference.chat_page import build_app, listen, serve
    from megatron_croc.inference.generation import Sampling

    socket = listen(0)
    number = socket.getsockname()[1]
    assert socket.getsockname()[0] == "127.0.0.1"
    app = build_app(chat_generator, Sampling(max_new_tokens=12))
    threading.Thread(target=serve, args=(app, socket), daemon=True).start()
    return number


def call(port: int, method: str, path: str, body: bytes = b"", **headers: str):
    """(status, headers, body); as the page itself unless headers say otherwise."""
    sent = {"Host": f"127.0.0.1:{port}"}
    if method == "POST":
        sent["Origin"] = f"http://127.0.0.1:{port}"
        sent["Content-Type"] = f"multipart/form-data; boundary={BOUNDARY}"
    sent |= headers
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {k: v for k, v in sent.items() if v})
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


def form(images: tuple[bytes, ...] = (), **fields: str) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    for image in images:
        named = f'{head}"images"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
        parts.append(named.encode() + image + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def new(port: int) -> str:
    status, _, body = call(port, "POST", "/new")
    assert status == 200
    return json.loads(body)["id"]


def test_page_loads_nothing_from_elsewhere(port):
    status, headers, body = call(port, "GET", "/")
    assert status == 200 and b"<title>croc chat" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"http://" not in body and b"https://" not in body


def test_answers_are_those_of_the_conversation(port, chat_generator, chat_image):
    from megatron_croc.inference.chat import Conversation
    from megatron_croc.inference.generation import Sampling

    chat = Conversation(chat_generator, Sampling(max_new_tokens=12))
    chat.add_image("a", chat_image.read_bytes())
    name = new(port)
    for text, images in (("What is it?", (chat_image.read_bytes(),)), ("Which colour?", ())):
        status, _, body = call(port, "POST", "/ask", form(images, id=name, text=text))
        *pieces, end = map(json.loads, body.splitlines())
        assert status == 200 and len(pieces) > 2
        assert "".join(p["piece"] for p in pieces) == "".join(chat.ask(text))
        assert end == {"end": True, "is_finished": chat.is_finished}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 400),
    ],
)
def test_other_sites_are_refused(port, headers, status):
    assert call(port, "POST", "/new", **headers)[0] == status


def test_other_host_names_do_not_see_the_page(port):
    assert call(port, "GET", "/", Host=f"evil.example:{port}")[0] == 400
    assert call(port, "GET", "/", Host=f"localhost:{port}")[0] == 200


def test_faults_are_told_in_a_line(port, chat_image):
    name = new(port)
    for body, status, message in (
        (form((b"no image",), id=name, text="a"), 400, "not an image"),
        (form((chat_image.read_bytes()[:2000],), id=name, text="a"), 400, "does not decode"),
        (form(id=name, text=" "), 400, "empty"),
        (form(id=name, text="word " * 5000), 400, "reset the conversation"),
        (form(id="other", text="a"), 404, "no longer known"),
        (form((bytes(33 * 2**20),), id=name, text="a"), 413, "choose smaller images"),
    ):
        got, _, reply = call(port, "POST", "/ask", body)
        assert got == status and message in json.loads(reply)["error"]
    # A refused question holds neither the model nor its images.
    assert call(port, "POST", "/ask", form(id=name, text="What is it?"))[0] == 200


def test_uploads_are_not_written_to_disk(port, chat_image, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr("werkzeug.formparser.SpooledTemporaryFile", fail)
    large = chat_image.read_bytes() + bytes(2 * 2**20)
    assert call(port, "POST", "/ask", form((large,), id=new(port), text="a"))[0] == 200


def test_a_taken_port_is_one_line(port):
    from megatron_croc.errors import ConfigError
    from megatron_croc.inference.chat_page import listen

    with pytest.raises(ConfigError, match="choose another with --port"):
        listen(port)


@pytest.mark.slow
def test_in_a_browser(port, chat_image, tmp_path):
    """An image and two questions, then a reset."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--window-size=900,800"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    page = webdriver.Chrome(options=options, service=service)
    try:
        page.get(f"http://127.0.0.1:{port}/")
        find = page.find_elements
        page.find_element("id", "file").send_keys(str(chat_image))
        for turns, text in enumerate(("What is it?", "Which colour?"), start=1):
            page.find_element("id", "text").send_keys(text)
            page.find_element("id", "send").click()
            until = time.monotonic() + 60
            while len(find("css selector", ".model[data-done]")) < turns:
                assert time.monotonic() < until, page.find_element("id", "turns").text
                time.sleep(0.1)
        answers = [box.text for box in find("css selector", ".model")]
        assert all(answers) and len(find("css selector", ".human img")) == 1
        assert not find("css selector", ".error")
        page.save_screenshot(str(tmp_path / "chat.png"))
        page.find_element("id", "reset").click()
        assert not find("css selector", ".turn")
        assert page.get_log("browser") == []
    finally:
        page.quit()
