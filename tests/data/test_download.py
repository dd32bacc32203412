"""Downloads from a real local server: retried, atomic, explained when they fail."""

import http.server
import threading

import pytest

from vqmoe_megatron.data.download import NUM_ATTEMPTS, download_file


@pytest.fixture
def server():
    """A server whose ``responses`` are (status, body, announced bytes), one per request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.num_requests += 1
            status, body, announced_bytes = self.server.responses.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(announced_bytes))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Stay quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as instance:
        instance.num_requests = 0
        thread = threading.Thread(target=instance.serve_forever, args=(0.01,))
        thread.start()
        yield instance
        instance.shutdown()
        thread.join()


def url(server) -> str:
    return f"http://127.0.0.1:{server.server_port}/x.zip"


def test_a_failing_and_a_cut_response_are_retried(server, tmp_path):
    server.responses = [(503, b"", 0), (200, b"hel", 5), (200, b"hello", 5)]
    download_file(url(server), tmp_path / "x.zip", first_wait_s=0.0)
    assert (tmp_path / "x.zip").read_bytes() == b"hello"
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_a_missing_file_is_not_retried_and_nothing_appears(server, tmp_path):
    server.responses = [(404, b"", 0)]
    with pytest.raises(ValueError, match="404.*--input"):
        download_file(url(server), tmp_path / "x.zip", first_wait_s=0.0)
    assert server.num_requests == 1 and not (tmp_path / "x.zip").exists()


def test_it_gives_up_in_the_end(server, tmp_path):
    server.responses = [(500, b"", 0)] * NUM_ATTEMPTS
    with pytest.raises(ValueError, match="cannot download"):
        download_file(url(server), tmp_path / "x.zip", first_wait_s=0.0)
    assert server.num_requests == NUM_ATTEMPTS
