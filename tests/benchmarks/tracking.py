"""Does an MLflow that fails slow the training down? One run, interleaved: the server is well, ails,
is well again.

    python tests/benchmarks/tracking.py [--seconds 60] [--rounds 1] [--json FILE]

A process trains a small model with the hook and logs every step, to a real `mlflow server` behind a
proxy that can answer for it. Per ailment: the median step time while it lasted over the median of
as long before and after it, and the same of the CPU time of the whole process a step (a mean),
which other work on the machine disturbs less. The row `none` changes nothing: what it is off 1 is
the machine's noise. In the end the points in MLflow are counted. Many short rounds (`--seconds 5
--rounds 8`) cancel a changing load; one long one shows a long outage.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from lwo_dist.spool import SPOOL_NAME
from lwo_dist.tracking.mlflow import create_run, replay
from tests.tracking import Server, begin, client_of, config_for, history, shown_of

AILMENTS = (
    "none",
    "stopped",
    "frozen",
    "answers 500",
    "slow by 10 s a call",
    "refuses the password",
)
SLOW_S = 10.0


class Proxy:
    """Passes every request on to the server, unless it is told to answer for it."""

    def __init__(self, port: int) -> None:
        self.ailment = "none"
        self._upstream = port
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, answer, kind = proxy.answer(
                    self.command, self.path, body, dict(self.headers)
                )
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # the client gave up waiting, or the server is gone
                    self.close_connection = True

        self._handler, self._port = Handler, 0
        self.listen()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def listen(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, bytes, str]:
        if self.ailment == "answers 500":
            return 500, b"{}", "application/json"
        if self.ailment == "refuses the password":
            return 401, b"{}", "application/json"
        if self.ailment == "slow by 10 s a call":
            time.sleep(SLOW_S)
        headers["Host"] = f"127.0.0.1:{self._upstream}"
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=600)
        ) as upstream:
            upstream.request(method, path, body, headers)
            response = upstream.getresponse()
            return (
                response.status,
                response.read(),
                response.headers.get("Content-Type", "application/json"),
            )


def train(folder: Path, uri: str, run_id: str | None) -> None:
    """Train and log until the file `stop` is there; per step a line in `steps`: its end, its
    seconds, its CPU time.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import lwo_dist

    torch.set_num_threads(1)
    size = Qwen2Config(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lwo = lwo_dist.attach(Qwen2ForCausalLM(size), lwo_dist.LWOConfig(lr=1e-4, steps_per_layer=20))
    tokens = torch.randint(0, 512, (4, 128))
    callback = begin(config_for(uri, flush_timeout_s=120), folder, "run", run_id)
    names = [layer.name for layer in lwo.layers]
    with (folder / "steps").open("w", buffering=1) as steps:
        step = 0
        while not (folder / "stop").exists():
            started, cpu = time.perf_counter(), time.process_time()
            loss = lwo.model(input_ids=tokens, labels=tokens).loss
            lwo.backward(loss)
            report = lwo.step()
            step += 1
            values = {f"more/{i}": step + i for i in range(12)}
            values |= {"train/loss": loss.item(), "lwo/active_layer": names.index(report.layer)}
            callback.on_metrics(step, values)
            if report.switched:
                callback.on_switch(step, lwo.active_layer.name)
            steps.write(
                f"{time.time()} {time.perf_counter() - started} {time.process_time() - cpu}\n"
            )
    callback.on_run_end({})


def measure(seconds: float, rounds: int, folder: Path) -> dict[str, Any]:
    server = Server(folder)
    server.start()
    proxy = Proxy(server.port)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_HTTP_REQUEST_TIMEOUT",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    ):
        environment.pop(name, None)
    run_id = create_run(config_for(proxy.uri), folder, "run")
    command = [sys.executable, __file__, "--train", str(folder), proxy.uri, str(run_id)]
    trainer = subprocess.Popen(command, env=environment)
    try:
        while (
            not (folder / "steps").exists() or len((folder / "steps").read_text().splitlines()) < 50
        ):
            assert trainer.poll() is None, "the training ended early"
            time.sleep(0.5)
        cases = [
            _case(ailment, seconds, server, proxy, kills=rounds == 1)
            for ailment in AILMENTS * rounds
        ]
        (folder / "stop").touch()
        assert trainer.wait(timeout=600) == 0
        replay(folder / "run", proxy.uri)  # what the end had no time for
        client, spool = client_of(server.uri), folder / "run" / SPOOL_NAME
        held = sum(map(len, history(client, str(run_id)).values()))
        status = client.get_run(run_id).info.status
    finally:
        trainer.kill()
        trainer.wait()
        server.stop()
    times = [
        tuple(map(float, line.split())) for line in (folder / "steps").read_text().splitlines()
    ]
    for case in cases:
        _judge(case, times)
    cases = [
        _over_rounds([case for case in cases if case["ailment"] == ailment]) for ailment in AILMENTS
    ]
    return {
        "cases": cases,
        "points_spooled": len(shown_of(spool)),
        "points_held": held,
        "status": status,
    }


def _case(
    ailment: str, seconds: float, server: Server, proxy: Proxy, kills: bool
) -> dict[str, Any]:
    print(f"{ailment}: {seconds:g} s, between as long without", file=sys.stderr, flush=True)
    well_before = _stretch(seconds / 2)
    proxy.ailment = ailment
    if ailment == "stopped":
        proxy.close()
        if kills:
            server.stop()
    elif ailment == "frozen":
        server.signal(signal.SIGSTOP)
    ill = _stretch(seconds)
    if ailment == "stopped":
        server.start()  # takes long and much of the machine: in no stretch
        proxy.listen()
    elif ailment == "frozen":
        server.signal(signal.SIGCONT)
    proxy.ailment = "none"
    return {"ailment": ailment, "well": [well_before, _stretch(seconds / 2)], "ill": [ill]}


def _stretch(seconds: float) -> tuple[float, float]:
    started = time.time()
    time.sleep(seconds)
    return started, time.time()


def _judge(case: dict[str, Any], times: list[Any]) -> None:
    for kind in ("well", "ill"):
        within = [
            (s, cpu)
            for end, s, cpu in times
            if any(a <= end - s and end <= b for a, b in case[kind])
        ]
        case[f"steps_{kind}"], case[f"seconds_{kind}"] = (
            len(within),
            statistics.median(s for s, _ in within),
        )
        case[f"cpu_seconds_{kind}"] = statistics.fmean(cpu for _, cpu in within)
        del case[kind]
    case["ratio"] = case["seconds_ill"] / case["seconds_well"]
    case["cpu_ratio"] = case["cpu_seconds_ill"] / case["cpu_seconds_well"]


def _over_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    figures = {
        name: statistics.median(case[name] for case in rounds)
        for name in rounds[0]
        if name != "ailment"
    }
    return {
        "ailment": rounds[0]["ailment"],
        **figures,
        "ratios": [case["ratio"] for case in rounds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="how long each ailment lasts; default: %(default)s",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often each is measured; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        folder, uri, run_id = arguments.train
        train(Path(folder), uri, run_id)
        return
    folder = Path(tempfile.mkdtemp(prefix="tracking-"))
    try:
        load = os.getloadavg()[0]
        result = {
            **measure(arguments.seconds, arguments.rounds, folder),
            "cores": os.cpu_count(),
            "load_before": load,
        }
        result["load_after"] = os.getloadavg()[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'ailment':<22}{'step, ms':>10}{'well, ms':>10}{'ratio':>8}{'of CPU':>8}")
    for case in result["cases"]:
        ill, well = case["seconds_ill"] * 1e3, case["seconds_well"] * 1e3
        figures = f"{ill:>10.1f}{well:>10.1f}{case['ratio']:>8.3f}"
        print(f"{case['ailment']:<22}{figures}{case['cpu_ratio']:>8.3f}")
    print(
        f"points: {result['points_spooled']} spooled, {result['points_held']} in MLflow; run"
        f" {result['status']}"
    )
    print(
        f"load {result['load_before']:.1f} to {result['load_after']:.1f} on {result['cores']} cores"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
