"""What the builder costs beside the server: ``python benchmarks/builder.py [--requests 20000] [--rounds 3]``.

A scripted server answers every question after a fixed 200 ms. The same questions are put to it by

    bare     a loop over the same ``openai`` client, no ledger, no checks, no progress
    build    ``inf-ir build``: ledger, checks, progress, dataset and report
    tasks    the same with ``--executor local --workers 2``
    curator  bespokelabs-curator, in a virtual environment of its own (``--no-curator`` leaves it out)

each in a process of its own, by turns, ``--rounds`` times; of each, the round of median time counts, of two the slower one.
CPU time is that of the process, imports left out; the server runs beside it. Prints a table, and writes it to
``benchmarks/results/builder.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
import venv
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECORD_REQUESTS = 6
CONCURRENCY = 256
LATENCY = 0.2


def write_pairs(path: Path, count: int) -> None:
    """Pairs of random words, no two alike."""
    generator = random.Random(0)
    words = [
        f"{a}{b}{c}" for a in ("ba", "ko", "li", "mu", "se") for b in ("ran", "til", "vos") for c in ("d", "k", "m", "p")
    ]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            query = " ".join(generator.choices(words, k=6))
            passage = " ".join(generator.choices(words, k=60))
            file.write(json.dumps({"id": f"b{number}", "query": query, "passage": passage}) + "\n")


def usage() -> dict[str, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu": used.ru_utime + used.ru_stime, "memory_mib": used.ru_maxrss / 1024}


def report(started: float, before: dict[str, float], requests: int) -> None:
    """Print what this process took, as the last line of its output."""
    wall = time.perf_counter() - started
    after = usage()
    result = {"requests": requests, "wall": wall, "cpu": after["cpu"] - before["cpu"], "memory_mib": after["memory_mib"]}
    print(json.dumps(result))


def serve(folder: Path, latency: float) -> None:
    """The scripted server; its answers are those of the tests' server, its faults are none."""
    from aiohttp import web

    sys.path.insert(0, str(HERE.parent))
    from tests.llm_server import answer

    async def complete(request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        form = body.get("response_format", {}).get("json_schema", {}).get("name")
        content = answer(form, body["messages"][1]["content"]) if form in FORMS else {"answer": "A"}
        if form == "Choice" and content["answer"] == "several":
            content = {"answer": "A"}
        await asyncio.sleep(latency)
        message = {"role": "assistant", "content": json.dumps(content)}
        completion = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 300, "completion_tokens": 80, "total_tokens": 380},
        }
        return web.json_response(completion)

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", complete)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        part = folder / "port.part"
        part.write_text(str(site._server.sockets[0].getsockname()[1]))
        part.rename(folder / "port")
        await asyncio.Event().wait()

    asyncio.run(run())


FORMS = ("Instructed", "Poisoned", "Written", "Choice", "YesNo")


def questions(pairs: Path, count: int) -> list[list[dict[str, str]]]:
    """The messages of judge questions, one like the other in size to what a build asks."""
    from dataset_builder import stages

    found = []
    for line in pairs.open(encoding="utf-8"):
        pair = json.loads(line)
        for row in range(RECORD_REQUESTS):
            values = {"query": f"{pair['query']} {row}", "instruction": pair["query"], "passages": [pair["passage"]] * 3}
            found.append(stages.render("judge", values))
            if len(found) == count:
                return found
    return found


def bare(pairs: Path, url: str, count: int) -> None:
    """A loop over the client, as one would write it in ten lines."""
    from dataset_builder import stages
    from dataset_builder.live import connect

    asked = questions(pairs, count)
    form = {"name": "Choice", "strict": True, "schema": stages.Choice.model_json_schema()}

    async def run() -> None:
        client, _ = connect(url, 120, CONCURRENCY)
        async with client:
            left = iter(asked)

            async def work() -> None:
                for messages in left:
                    body = {
                        "model": "gpt-4o-mini",
                        "messages": messages,
                        "temperature": 0.0,
                        "seed": 0,
                        "max_tokens": 50,
                        "response_format": {"type": "json_schema", "json_schema": form},
                    }
                    completion = await client.chat.completions.create(**body)
                    json.loads(completion.choices[0].message.content)

            await asyncio.gather(*(work() for _ in range(CONCURRENCY)))

    before, started = usage(), time.perf_counter()
    asyncio.run(run())
    report(started, before, len(asked))


def build(pairs: Path, url: str, folder: Path, executor: bool) -> None:
    """The command, in this process."""
    from dataset_builder import batches, cli, export, run, stages  # noqa: F401 - not measured

    arguments = ["build", "--pairs", pairs, "--output", folder, "--base-url", url]
    if executor:  # half of the requests in flight are each task's
        arguments += ["--executor", "local", "--tasks", 2, "--workers", 2, "--concurrency", CONCURRENCY // 2]
    else:
        arguments += ["--concurrency", CONCURRENCY]
    sys.argv = ["inf-ir", *map(str, arguments)]
    before, started = usage(), time.perf_counter()
    with contextlib.suppress(SystemExit):
        cli.main()
    counts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report(started, before, int(sum(model["requests"] for model in counts["usage"].values())))


CURATOR = """
import json, os, sys, time
os.environ |= {"CURATOR_VIEWER": "0", "TELEMETRY_ENABLED": "0", "OPENAI_API_KEY": "none"}
import tiktoken
try:
    tiktoken.get_encoding("cl100k_base")
except Exception:  # no network: curator estimates tokens with a download; counting words instead only makes it quicker
    class Words:
        encode = staticmethod(lambda text, **options: text.split())
    tiktoken.get_encoding = tiktoken.encoding_for_model = lambda name: Words()
from bespokelabs import curator

class Judge(curator.LLM):
    def prompt(self, row):
        return row["messages"]
    def parse(self, row, response):
        return {"answer": json.loads(response)["answer"]}

questions = [{"messages": messages} for messages in json.load(open(sys.argv[1]))]
judge = Judge(model_name="gpt-4o-mini", backend="openai", backend_params={
    "base_url": sys.argv[2], "max_requests_per_minute": 10_000_000, "max_tokens_per_minute": 10_000_000_000,
    "max_concurrent_requests": int(sys.argv[3]), "require_all_responses": True})
started = time.perf_counter()
judge(questions, working_dir=sys.argv[4])
print(json.dumps({"requests": len(questions), "wall": time.perf_counter() - started}))
"""


def install_curator(place: Path) -> None:
    """A virtual environment with curator; ends the program if it cannot be made."""
    venv.create(place, with_pip=True)
    installed = subprocess.run(
        [place / "bin" / "pip", "install", "--quiet", "bespokelabs-curator", "setuptools<81"], capture_output=True, text=True
    )
    if installed.returncode:
        sys.exit(f"curator could not be installed, --no-curator leaves it out: {installed.stderr[-3000:]}")


def curator(place: Path, pairs: Path, url: str, count: int, folder: Path) -> dict[str, float]:
    """Requests and seconds of curator on the same server and judge questions; ends the program if it fails."""
    folder.mkdir()
    asked = folder / "questions.json"
    asked.write_text(json.dumps(questions(pairs, count)))
    result = subprocess.run(
        [place / "bin" / "python", "-c", CURATOR, asked, url, str(CONCURRENCY), folder / "work"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(folder / "hf"), "CURATOR_CACHE_DIR": str(folder / "cache")},
    )
    if result.returncode:
        sys.exit(f"curator failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def child(*arguments: object) -> dict[str, float]:
    """Run one of the above in a process of its own."""
    result = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENAI_API_KEY": "none", "PYTHONPATH": str(HERE.parent)},
    )
    if result.returncode:
        sys.exit(f"{arguments[0]} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-records", type=int, default=20_000, help="0 leaves the measurement of memory out")
    parser.add_argument("--no-curator", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        servers = {}
        for label, latency in (("slow", LATENCY), ("quick", 0.0)):
            (folder / label).mkdir()
            servers[label] = subprocess.Popen([sys.executable, __file__, "serve", folder / label, str(latency)])
        try:
            urls = {}
            for label in servers:
                while not (folder / label / "port").exists():
                    time.sleep(0.05)
                urls[label] = f"http://127.0.0.1:{(folder / label / 'port').read_text()}/v1"
            measure(arguments, folder, urls)
        finally:
            for server in servers.values():
                server.kill()


def measure(arguments: argparse.Namespace, folder: Path, urls: dict[str, str]) -> None:
    records = -(-arguments.requests // RECORD_REQUESTS)
    pairs = folder / "pairs.jsonl"
    write_pairs(pairs, records)
    if not arguments.no_curator:
        install_curator(folder / "curator")
    rounds = []
    for number in range(arguments.rounds):
        place = folder / str(number)
        place.mkdir()
        taken = {
            "bare": child("bare", pairs, urls["slow"], records * RECORD_REQUESTS),
            "build": child("build", pairs, urls["slow"], place / "one"),
            "tasks": child("tasks", pairs, urls["slow"], place / "two"),
        }
        if not arguments.no_curator:
            asked = records * RECORD_REQUESTS
            taken["curator"] = curator(folder / "curator", pairs, urls["slow"], asked, place / "curator")
        rounds.append(taken)
    runs = {
        label: sorted((taken[label] for taken in rounds), key=lambda run: run["wall"])[len(rounds) // 2]
        for label in rounds[0]
    }
    cpu = {label: 1000 * run["cpu"] / run["requests"] for label, run in runs.items() if "cpu" in run}
    ideal = runs["build"]["requests"] / CONCURRENCY * LATENCY
    rows = [
        ("requests", f"{runs['build']['requests']:.0f}", ""),
        ("CPU per request, bare", f"{cpu['bare']:.2f} ms", ""),
        ("CPU per request, build", f"{cpu['build']:.2f} ms", ""),
        ("CPU per request, build / bare", f"{cpu['build'] / cpu['bare']:.2f}", "1.25"),
        ("wall, bare", f"{runs['bare']['wall']:.1f} s", ""),
        ("wall, build", f"{runs['build']['wall']:.1f} s", ""),
        ("wall, build / max(bare, ideal)", f"{runs['build']['wall'] / max(runs['bare']['wall'], ideal):.2f}", "1.15"),
        ("wall, 2 tasks / 1", f"{runs['tasks']['wall'] / runs['build']['wall']:.2f}", ""),
    ]
    if arguments.memory_records:
        peaks = []
        for count in (1000, arguments.memory_records):
            write_pairs(folder / f"{count}.jsonl", count)
            peaks.append(child("build", folder / f"{count}.jsonl", urls["quick"], folder / f"out-{count}")["memory_mib"])
        rows.append(
            (f"peak memory, 1,000 and {arguments.memory_records:,} records", f"{peaks[0]:.0f} and {peaks[1]:.0f} MiB", "")
        )
        rows.append(("difference", f"{peaks[1] - peaks[0]:+.0f} MiB", "60"))
    if not arguments.no_curator:
        rounds_rates = [{label: run["requests"] / run["wall"] for label, run in taken.items()} for taken in rounds]
        rates = {label: run["requests"] / run["wall"] for label, run in runs.items()}
        rows.append(("requests per second", ", ".join(f"{label} {rate:.0f}" for label, rate in rates.items()), ""))
        for label, bound in (("build", "at least 1.9"), ("tasks", "at least 2")):
            ratios = sorted(of_round[label] / of_round["curator"] for of_round in rounds_rates)
            shown = f"{rates[label] / rates['curator']:.2f} (rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})"
            rows.append((f"{label} / curator", shown, bound))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"\n{date.today()}, {machine}; {CONCURRENCY} in flight, {LATENCY:g} s for an answer\n")
    print("| measure | value | bound |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    saved = {"date": str(date.today()), "machine": machine, "runs": runs, "rows": rows}
    (results / "builder.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind == "serve":
        serve(Path(sys.argv[2]), float(sys.argv[3]))
    elif kind == "bare":
        bare(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    elif kind in ("build", "tasks"):
        build(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), executor=kind == "tasks")
    else:
        main()
