"""Latency, throughput and memory of `internvl-jax serve` under many clients, on the loopback.

    python benchmarks/serve.py --json benchmarks/results/serve.json

Starts the command with the two shipped checkpoints in a process of its own, waits until it has
compiled its programs, and lets 64 clients send 2,000 requests in all (chats about an image, plain
and streamed, and embeddings of texts and of images, in a fixed mixture); every answer is checked
to be complete: 200, or the 429 that the server documents. The server takes 48 requests at once,
fewer than there are clients, so that 429 occurs; a client that gets it waits a moment and asks
again, as the `openai` package does. Latency is that of the try that was answered, from the very
first request on. Memory is the server's resident set, read from /proc after half of the requests
and after all: it must not grow with their number. With --skip_warm_up the server compiles while it
is measured. Needs Linux.
"""

import argparse
import base64
import datetime
import http.client
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from internvl_jax.data.sources import EmbeddedScenes

CLIENTS, REQUESTS = 64, 2000
MOST_SECONDS = 1200
KINDS = ("chat", "stream", "text", "image")
PORT = 8731


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--skip_warm_up", action="store_true", help="as of the server")
    args = parser.parse_args()
    figures = measure(args.clients, args.requests, args.skip_warm_up)
    print(table(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    if set(figures["answers"]) - {"200", "429"}:
        sys.exit(1)


def measure(clients: int, requests: int, cold: bool) -> dict:
    """Starts the server, loads it, stops it."""
    words = ("serve", "--checkpoint=demo-chat", "--checkpoint=demo", f"--port={PORT}")
    limits = ("--max_requests=48", "--max_new_tokens=24", "--max_prompt_tokens=256")
    skip = ["--skip_warm_up"] if cold else []
    command = [sys.executable, "-m", "internvl_jax.cli", *words, *limits, *skip]
    started = time.perf_counter()
    server = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    try:
        wait_until_ready(server)
        ready = time.perf_counter() - started
        bodies = make_bodies()
        began = time.perf_counter()
        records = load(clients, requests // 2, bodies, 0)
        before = memory(server.pid)
        records += load(clients, requests - requests // 2, bodies, 1)
        seconds = time.perf_counter() - began
        after = memory(server.pid)
    finally:
        server.terminate()
        server.wait(60)
    done = [record for record in records if record[1] == 200]
    answered = [record for record in records if record[1] != 429]
    return {
        "clients": clients,
        "requests": len(answered),
        "programs_compiled": "as requests come" if cold else "before the first request",
        "ready_after_s": ready,
        "answers": dict(Counter(str(code) for _, code, _ in records)),
        "seconds": seconds,
        "completed_per_s": len(done) / seconds,
        "latency_s": {
            kind: quantiles([t for k, _, t in done if kind in ("all", k)])
            for kind in ("all", *KINDS)
        },
        "rss_mib_half": before,
        "rss_mib_after": after,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux",
        "load_of_the_machine": os.getloadavg()[1],
    }


def wait_until_ready(server: subprocess.Popen) -> None:
    for _ in range(6000):
        if server.poll() is not None:
            raise RuntimeError("the server ended before it was ready")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server was not ready after twenty minutes")


def make_bodies() -> dict[str, list[tuple[str, bytes]]]:
    """{kind: [(path, body)]}, several of each."""
    source, bodies = EmbeddedScenes("test_single", 8, image_size=96), {kind: [] for kind in KINDS}
    for index in range(8):
        file = io.BytesIO()
        Image.fromarray(source.image(index)).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        question = ("what color is the object?", "what shape is the object?")[index % 2]
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question},
        ]
        chat = {"model": "demo-chat", "messages": [{"role": "user", "content": parts}]}
        texts = [f"a {color} star" for color in ("red", "green", "blue")[: 1 + index % 3]]
        chats, embeddings = "/v1/chat/completions", "/v1/embeddings"
        bodies["chat"].append((chats, json.dumps(chat).encode()))
        bodies["stream"].append((chats, json.dumps({**chat, "stream": True}).encode()))
        bodies["text"].append((embeddings, json.dumps({"model": "demo", "input": texts}).encode()))
        bodies["image"].append((embeddings, json.dumps({"model": "demo", "input": url}).encode()))
    return bodies


def load(clients: int, requests: int, bodies: dict, seed: int) -> list[tuple[str, int, float]]:
    """(kind, HTTP status or 0, seconds) of every try at `requests` requests, many at once."""
    rng = random.Random(seed)
    order = [rng.choice(KINDS) for _ in range(requests)]
    records: list[tuple[str, int, float]] = []
    lock = threading.Lock()
    end = time.monotonic() + MOST_SECONDS

    def client() -> None:
        while time.monotonic() < end:
            with lock:
                if not order:
                    return
                number, kind = len(order), order.pop()
            path, body = bodies[kind][number % len(bodies[kind])]
            code = 429
            while code == 429 and time.monotonic() < end:
                began = time.perf_counter()
                code = request(path, body, kind)
                with lock:
                    records.append((kind, code, time.perf_counter() - began))
                if code == 429:
                    time.sleep(0.5)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return records


def request(path: str, body: bytes, kind: str) -> int:
    """The status of one request; 0 where the answer is cut off or not what was asked for."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            return response.status
        if kind == "stream":
            return 200 if answer.endswith(b"data: [DONE]\n\n") else 0
        parsed = json.loads(answer)
        return 200 if (parsed.get("choices") or parsed.get("data")) else 0
    except (OSError, ValueError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def memory(pid: int) -> float:
    """Resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    return {"p50": cuts[49], "p99": cuts[98], "max": max(seconds)} if seconds else {}


def table(figures: dict) -> str:
    lines = [
        f"{figures['requests']} requests of {figures['clients']} clients in "
        f"{figures['seconds']:.0f} s; answers {figures['answers']}; "
        f"{figures['completed_per_s']:.1f} completed per second",
        f"{'':8}{'p50 s':>8}{'p99 s':>8}{'max s':>8}",
    ]
    for kind, q in figures["latency_s"].items():
        if q:
            lines.append(f"{kind:8}{q['p50']:8.2f}{q['p99']:8.2f}{q['max']:8.2f}")
    half, after = figures["rss_mib_half"], figures["rss_mib_after"]
    lines.append(f"resident memory {half:.0f} MiB after half of them, {after:.0f} MiB at the end")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
