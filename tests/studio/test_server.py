"""What the page asks for, and two hundred requests that nobody should make."""

import errno
import json
import os
import socket
import struct
import threading
import time

import numpy as np
import pytest
from asking import ask
from PIL import Image

from midilite.model.masks import load_pair
from midilite.studio import server as module
from midilite.studio.options import StudioOptions
from midilite.studio.places import Outside, inside
from midilite.studio.server import open_server


def answer(studio, *given, **more):
    status, content, _ = studio.ask(*given, **more)
    assert status == 200, content
    return json.loads(content)


# ------------------------------------------------------------------------------------------------------ the page's way


def test_the_page_and_its_parts_are_there(studio):
    for path in ("/", "/page/app.js", "/page/viewer.js", "/page/studio.css", "/page/three.js"):
        status, content, headers = studio.ask(path)
        assert status == 200 and len(content) > 500 and "script-src" not in headers["Content-Security-Policy"]
        assert headers["Content-Security-Policy"].startswith("default-src 'self';")


def test_what_lies_below_the_start_folder_is_listed(studio):
    home = answer(studio, "/api/home")
    assert home["models"] == ["tiny", "model"] and home["results"] == [] and home["runs"] == []
    assert home["pictures"] == ["leads-out.png", "rgb.png"]


def test_from_a_dropped_picture_to_a_mask_beside_it(studio, tmp_path):
    picture = Image.open(studio.start / "rgb.png").convert("RGB").resize((1500, 1500))
    picture.save(tmp_path / "large.jpg")
    name = answer(studio, "/api/picture?name=../My%20photo.JPG", (tmp_path / "large.jpg").read_bytes())["picture"]
    assert name == "outputs/studio/pictures/My_photo.png"
    assert answer(studio, f"/api/look?path={name}") == {"size": [1024, 1024], "mask": None}
    with Image.open(studio.start / "seg.png") as mask:
        seg = np.asarray(mask)
    clicks = [[float(c) * 1024 / 448 for c in np.argwhere(seg == k).mean(0)[::-1]] for k in (1, 2, 3)]
    status, labels, _ = studio.ask("/api/objects", {"picture": name, "objects": [{"inside": [[c]]} for c in clicks]})
    assert status == 200 and len(labels) == 1024 * 1024 and set(labels) == {0, 1, 2, 3}
    saved = answer(studio, f'/api/mask?picture={name}&names=["bed","table","bin"]', labels)["mask"]
    assert saved == "outputs/studio/pictures/My_photo_seg.png"
    _, found = load_pair(studio.start / name, studio.start / saved)
    assert (found == np.frombuffer(labels, np.uint8).reshape(found.shape)).all()
    status, again, headers = studio.ask(f"/api/mask?picture={name}&path={saved}")
    assert status == 200 and again == labels and headers["X-Names"] == "%5B%22bed%22%2C%20%22table%22%2C%20%22bin%22%5D"
    twice = answer(studio, "/api/picture?name=My photo".replace(" ", "%20"), (tmp_path / "large.jpg").read_bytes())
    assert twice["picture"] == "outputs/studio/pictures/My_photo-2.png", "no picture replaces another one"


def test_a_mask_of_somebody_else_is_kept_and_one_from_here_is_replaced(studio):
    before, label = (studio.start / "seg.png").read_bytes(), bytes([1]) * 448
    for row in (1, 2):
        answer(studio, "/api/mask?picture=rgb.png", label * row + bytes(448 * (448 - row)))
    assert (studio.start / "before_seg.png").read_bytes() == before
    assert np.asarray(Image.open(studio.start / "seg.png")).sum() == 2 * 448
    assert {path.name for path in studio.start.glob("*seg*")} == {"seg.png", "before_seg.png"}
    (studio.start / "seg.png").write_bytes(before)
    answer(studio, "/api/mask?picture=rgb.png", label + bytes(448 * 447))
    assert (studio.start / "before_2_seg.png").read_bytes() == before, "the second one is kept, too"


def test_links_in_a_result_and_pipes_are_no_files(studio, tmp_path):
    """Past bugs: a linked scene.glb was handed out from anywhere, and a pipe was waited for without end."""
    (tmp_path / "secret.glb").write_bytes(b"secret")
    (studio.start / "result").mkdir()
    (studio.start / "result" / "facts.json").write_text("{}")
    (studio.start / "result" / "scene.glb").symlink_to(tmp_path / "secret.glb")
    os.mkfifo(studio.start / "pipe.png")
    for path in ("/api/download?path=result", "/file?path=pipe.png"):
        status, said, _ = studio.ask(path)
        assert 400 <= status < 500 and b"secret" not in said


def test_what_others_left_among_results_is_not_listed_and_looking_makes_no_folder(studio):
    assert answer(studio, "/api/home")["results"] == [] and not (studio.start / "outputs").exists()
    for number, text in enumerate(("[]", '{"picture": 3}', "{", '{"adapters": 5}')):
        folder = studio.start / "outputs" / "studio" / "results" / str(number)
        folder.mkdir(parents=True)
        (folder / "facts.json").write_text(text)
    assert answer(studio, "/api/home")["results"] == []


def test_a_log_with_odd_numbers_and_of_any_length_is_shown(studio):
    run = studio.start / "run"
    run.mkdir()
    lines = [f'{{"step": {step}, "loss": {step / 7}, "other": 1}}' for step in range(1, 4002)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4002, "loss": NaN, "lr": 1e999}', "{", "[]"]))
    state = answer(studio, "/api/run?path=run")
    assert state["step"] == 4002 and state["curves"]["loss"][-1] == [4001, 4001 / 7] and "lr" not in state["curves"]
    assert all(len(points) <= 1500 for points in state["curves"].values())
    assert answer(studio, "/api/run?path=run&since=4000")["curves"]["loss"] == [[4001, 4001 / 7]]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/picture?name=a", b"no picture", "a: "),
        ("/api/mask?picture=rgb.png", b"12", "expected 448 x 448"),
        ("/api/mask?picture=rgb.png", bytes(448 * 448), "no object is marked"),
        ("/api/objects", {"picture": "rgb.png", "objects": []}, "expected 1 to"),
        ("/api/objects", {"picture": "rgb.png", "objects": [{"inside": [[["a", 1]]]}]}, "could not convert"),
        ("/api/objects", {"picture": "rgb.png", "objects": [{"inside": [[]]}]}, "a stroke has no point"),
        ("/api/objects", {"picture": "rgb.png", "objects": [{"inside": [[[1e9, float("nan")]]]}]}, "no place"),
        ("/api/job", {"picture": "rgb.png", "steps": 0}, "steps is 0"),
        ("/api/job", {"picture": "rgb.png", "seed": 1.5}, "seed is 1.5"),
        ("/api/job", {"picture": "rgb.png", "model": "."}, "no model's folder"),
        ("/api/job", {"picture": "rgb.png", "model": "hub:owner/name"}, "nothing of that name"),
        ("/api/job", {"picture": "rgb.png", "adapters": [{"path": "model", "scale": "1"}]}, "strength"),
        ("/api/job", {"picture": "rgb.png", "adapters": 5}, "adapters are a list"),
        ("/api/job", {"picture": "rgb.png", "guidance": float("nan")}, "guidance is nan"),
        ("/api/wish", {"path": "model", "wish": "save"}, "no training runs there"),
        ("/api/wish", {"path": "model", "wish": "rm"}, "expected one of save, stop"),
    ],
)
def test_what_cannot_be_used_is_said(studio, path, body, said):
    status, content, _ = studio.ask(path, body)
    assert status in (400, 404) and said in json.loads(content)["error"]


def test_a_job_that_is_no_number_is_none(studio):
    assert answer(studio, "/api/cancel", {"job": [1]}) is None and answer(studio, "/api/cancel", {"job": True}) is None


def test_another_address_needs_the_token(start):
    server = open_server(StudioOptions(folder=str(start), host="0.0.0.0", port=0))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        assert ask(server, "/")[0] == 401 and ask(server, "/?token=wrong")[0] == 401
        status, _, headers = ask(server, f"/?token={server.token}")
        cookie = headers["Set-Cookie"]
        assert status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert ask(server, "/api/home", headers={"Cookie": cookie.partition(";")[0]})[0] == 200
        assert ask(server, "/", host=f"evil.example:{server.server_address[1]}")[0] == 403
    finally:
        server.shutdown()
        server.server_close()
        assert server.studio.jobs.close()


# ------------------------------------------------------------------------------------------------------------ hostile

PATHS = [
    "../secret.png", "..%2fsecret.png", "%2e%2e/secret.png", "....//secret.png", "..\\secret.png", "/etc/passwd",
    "//etc/passwd", "leads-out.png", "model/../../secret.png", "%00", "rgb.png%00.png", "a" * 3000, ".", "", "~",
    "file:///etc/passwd", "%c0%ae%c0%ae/secret.png", "model", "model/model_index.json", ".hidden/a.png", "con",
    "\u202e", "http://127.0.0.1/", "rgb.png/..", "rgb.png/../../secret.png",
]  # fmt: skip
ADDRESSES = [
    "/file?path=", "/api/look?path=", "/api/mask?picture=rgb.png&path=", "/api/download?path=", "/api/run?path=",
]  # fmt: skip


def request(line: str, *headers: str, body: bytes = b"", host: str | None = "H") -> bytes:
    """The bytes of a request; the host H becomes the server's address."""
    lines = [f"{line} HTTP/1.1", *([] if host is None else [f"Host: {host}"]), *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def post(address: str, body: bytes, *headers: str) -> bytes:
    return request(f"POST {address}", "X-Studio: 1", *(headers or (f"Content-Length: {len(body)}",)), body=body)


RAW = [
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"\0" * 500,
    request("GET /../../../etc/passwd"), request("GET /page/../server.py"), request("GET /page/%2e%2e/server.py"),
    request("GET " + "/a" * 40000), request("GET /", host=None), request("GET /", host="evil.example"),
    request("GET /", "Host: H"), request("GET /", host="localhost.evil.example"), request("GET /", host="127.0.0.1"),
    request("GET /", host="[::1"), request("GET /", "Origin: http://evil.example"), request("GET /", "Origin: null"),
    request("GET /api/home", "Sec-Fetch-Site: cross-site"), request("GET /api/home", "Sec-Fetch-Site: same-site"),
    request("GET /", *["A: b"] * 500), request("GET /", "A: " + "b" * 70000), request("PUT /file"),
    request("DELETE /api/home"), request("TRACE /"), request("CONNECT a:1"), request("OPTIONS *"), request("HEAD /"),
    request("POST /api/job", "Content-Length: 2", body=b"{}"), request("POST /api/job", "X-Studio: 1", body=b"{}"),
    post("/api/job", b"{}", "Content-Length: -1"), post("/api/job", b"{}", "Content-Length: 1e3"),
    post("/api/picture", b"{}", "Content-Length: 99999999999"), post("/api/picture", b"{}", "Content-Length: 68157441"),
    post("/api/job", b"2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), post("/api/job", b"[1,2]"),
    post("/api/job", b"null"), post("/api/job", b"[" * 60000), post("/api/job", b"{}", "Content-Length: 9"),
    post("/api/objects", b'{"picture":1}'), post("/api/nothing", b"{}"), post("/", b""), post("/api/job", b"\xff\xfe"),
    request("GET /api/job?job=x"), request("GET /api/job?job=99"), request("GET /api/run?since=1e9&path=."),
    request("GET /api/data?path=model"), request("GET /?" + "a=b&" * 3000), request("GET http://[bad/"),
    request("GET /api/download?path=model&format=.exe"), request("GET /api/sample?path=.&name=x"),
    request("GET /api/home?" + "path=.&" * 50), request("GET /api/mask?picture=rgb.png&path=model&x=" + "y" * 9000),
]  # fmt: skip


def raw(studio, content: bytes) -> bytes:
    """What the server answers to these bytes; nothing is an answer, too."""
    port = studio.server.server_address[1]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(content.replace(b"Host: H", f"Host: 127.0.0.1:{port}".encode()))
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError as error:  # the server was quicker; what it said before is still there to be read
                if error.errno != errno.ENOTCONN:
                    raise
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
        except (ConnectionError, TimeoutError):
            return b""
        return b"".join(parts)


def test_two_hundred_hostile_requests_get_nothing_and_end_nothing(studio, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 2**20)
    hostile = [request(f"GET {address}{path}") for address in ADDRESSES for path in PATHS] + RAW
    for path in PATHS[:12]:
        body = json.dumps({"picture": path, "path": path, "wish": "stop", "objects": []}).encode()
        hostile += [post(f"/api/{name}", body) for name in ("job", "objects", "wish")]
    assert len(hostile) >= 200
    before = sorted(path.name for path in studio.start.parent.iterdir())
    for sent in hostile:
        content = raw(studio, sent)
        assert b"SECRET" not in content and b"root:" not in content and b"_class_name" not in content
        assert not content.startswith(b"HTTP/1.0 200"), sent[:200]
    assert sorted(path.name for path in studio.start.parent.iterdir()) == before
    assert answer(studio, "/api/home")["results"] == []


def test_half_open_connections_are_cut_off_and_others_are_served(studio, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 1.0)
    port = studio.server.server_address[1]
    idle = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(40)]
    for i, connection in enumerate(idle):
        connection.sendall([b"", b"GET / HT", b"POST /api/job HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"][i % 3])
    assert studio.ask("/api/results")[0] == 200
    end = time.monotonic() + 20
    while studio.server.open and time.monotonic() < end:
        time.sleep(0.1)
    assert not studio.server.open
    for connection in idle:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert studio.ask("/api/results")[0] == 200


def test_two_hundred_at_once(studio):
    codes, lock = [], threading.Lock()

    def visit():
        try:
            code = studio.ask("/api/results")[0]
        except OSError:  # too many at a time are sent away
            code = 0
        with lock:
            codes.append(code)

    threads = [threading.Thread(target=visit) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(codes) == 200 and set(codes) <= {200, 0} and codes.count(200) >= 64
    assert studio.ask("/api/results")[0] == 200


def test_paths_stay_inside(start):
    assert inside(start, "model/model_index.json").name == "model_index.json"
    for path in ("..", "/etc", "leads-out.png", "../start-2", ".git", "a\0b", None, 3, "x" * 2000):
        with pytest.raises(Outside):
            inside(start, path)
