"""A server of the OpenAI protocol that takes hardly any processor time, for measurements of clients beside it.

    python benchmarks/quick_server.py 0.02

Every request gets the same answer after so many seconds. The first line of its output is its port; it ends with its input. A server that
is an aiohttp application takes as much of the processors as a client does, and on a machine with two of them it is half of what is measured.
"""

import asyncio
import json
import sys
from typing import cast

REPLY = {
    "id": "x",
    "object": "chat.completion",
    "model": "m",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "The answer is 42. " * 5}}
    ],
    "usage": {"prompt_tokens": 40, "completion_tokens": 25},
}
"""A chat completion, whatever was asked."""
BODY = json.dumps(REPLY).encode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
END = b"\r\n\r\n"
LENGTH = b"content-length:"


class Connection(asyncio.Protocol):
    """A connection that is kept alive, with one request after the other.

    Args:
        latency: seconds from a request to its answer.
    """

    def __init__(self, latency: float) -> None:
        self._latency, self._received = latency, bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the other end, as asyncio asks for."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer the requests that are whole now."""
        self._received += data
        loop = asyncio.get_running_loop()
        while (end := self._received.find(END)) >= 0:
            head = bytes(self._received[:end]).lower()
            _, is_given, rest = head.partition(LENGTH)
            size = end + len(END) + (int(rest.split(b"\r\n", 1)[0]) if is_given else 0)
            if len(self._received) < size:
                return
            del self._received[:size]
            loop.call_later(self._latency, self._transport.write, ANSWER)


async def serve(latency: float) -> None:
    """Answer until the input ends.

    Args:
        latency: seconds from a request to its answer.
    """
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(latency), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
