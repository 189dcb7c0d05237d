"""Requests to the studio as its page makes them."""

import http.client
import json


def ask(server, path, body=None, method=None, headers=None, host=None):
    """(status, content, headers) of a request as the page makes it."""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    given = {"Host": host or f"127.0.0.1:{port}"} | ({} if body is None else {"X-Studio": "1"}) | (headers or {})
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, body, given)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, answer.headers
