"""A scripted OpenAI-compatible server with faults: ``python llm_server.py FOLDER [--faults] [--fault NAME] ...``.

It runs in a process of its own, so that builds can be killed beside it. Answers depend on the question alone; faults on
the question and on how often it came. Every question is noted in ``FOLDER/log.jsonl`` when it arrives and when its answer
has been handed over; the port is in ``FOLDER/port``.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from aiohttp import web


class Server:
    """This server in a process of its own."""

    def __init__(self, folder, *options):
        self.folder = folder
        folder.mkdir()
        self.process = subprocess.Popen([sys.executable, __file__, folder, *options])
        while not (folder / "port").exists():
            assert self.process.poll() is None
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{(folder / 'port').read_text()}/v1"

    def events(self):
        if not (self.folder / "log.jsonl").exists():
            return []
        *lines, _half_written = (self.folder / "log.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines]

    def wait_for(self, event, count=1):
        """Wait until the log has so many events of a kind."""
        while sum(entry["event"] == event for entry in self.events()) < count:
            time.sleep(0.02)

    def asked(self):
        return Counter(event["key"] for event in self.events() if event["event"] == "asked")

    def asked_after_answer(self):
        """Questions that came once more after their answer had been handed over."""
        answered, again = set(), []
        for event in self.events():
            if event["event"] == "answered":
                answered.add(event["key"])
            elif event["event"] == "asked" and event["key"] in answered:
                again.append(event["key"])
        return again

    def stop(self):
        self.process.kill()
        self.process.wait()


QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


def digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def code(number: int) -> str:
    return "".join("bcdfghklmnprstvz"[number >> 4 * place & 15] + "aeiou"[number >> 3 * place & 3] for place in range(4))


def answer(kind: str, user: str) -> dict[str, str]:
    """A well-behaved model: the judge finds the passage that carries the twin's mark."""
    texts = [json.loads(text) for text in QUOTED.findall(user)]
    number = digest(user)
    if kind == "Instructed":
        return {"instruction": f"Only pages a {code(number)} reader can follow without help, please."}
    if kind == "Poisoned":
        return {
            "instruction": f"Only pages zeta{code(number)} experts can follow, please.",
            "query": f"{texts[1]} omega{code(number)}",
        }
    if kind == "Written":
        document = texts[2].split()
        zeta, omega = re.findall(r"zeta\w+", user)[0], re.findall(r"omega\w+", user)[0]
        body = [" ".join(f"{word[::-1]}{tail}" for word in document) for tail in ("a", "b")]
        if max(map(len, document)) > 40:  # a script without spaces
            body = ["".join(random.Random(tail).sample(texts[2], len(texts[2]))) for tail in ("a", "b")]
        return {"passage_1": f"{body[0]} {zeta}", "passage_2": f"{body[1]} {omega}"}
    if kind == "Contrasted":  # the first of the two passages is right under the first instruction
        if digest(texts[0] + texts[2]) % 3 == 0:
            return {"both_answer": "no", "kind": "", "instruction_1": "", "instruction_2": ""}
        marks = [f"mark{digest(text):x}" for text in texts[1:3]]
        told = [f"Only pages that {mark} readers can follow, please." for mark in marks]
        return {"both_answer": "yes", "kind": "audience", "instruction_1": told[0], "instruction_2": told[1]}
    if kind == "Choices":
        right = {f"mark{digest(text):x}": letter for letter, text in zip("AB", texts[3:5])}
        if digest(texts[0]) % 5 == 0:
            return {"instruction_1": "both", "instruction_2": "none"}
        found = [right[re.findall(r"mark\w+", text)[0]] for text in texts[1:3]]
        return {"instruction_1": found[0], "instruction_2": found[1]}
    query, instruction, *passages = texts[:5]
    wanted = "omega" if "omega" in query else "zeta" if "zeta" in instruction else None
    right = [(wanted in text) if wanted else not re.search("zeta|omega", text) for text in passages]
    if kind == "YesNo":
        return {"answer": "yes" if right[0] else "no"}
    if digest(query) % 5 == 0:
        return {"answer": "several"}
    return {"answer": "ABC"[right.index(True)] if True in right else "none"}


def odd(kind: int, completion: dict) -> bytes:
    """A completion that no client can use, in one of many ways."""
    message = completion["choices"][0]["message"]
    bodies = (
        b"", b"<html>Bad gateway, but 200</html>", "<html>caf\xe9</html>".encode("latin-1"), b"[" * 200_000,
        b'{"choices": []}', b'{"choices": [{"message": null}]}', b'{"object": "list", "data": []}', b"null", b"3e999",
    )  # fmt: skip
    if kind < len(bodies):
        return bodies[kind]
    contents = (
        "\ud800",
        ["a", "list"],
        7,
        {"a": 1},
        True,
        "x" * 10_000_000,
        json.dumps({"[/red]": 1}),
        "[" * 100_000,
        "\x00",
    )
    message["content"] = contents[kind % len(contents)]
    return json.dumps(completion).encode()


ODD_USAGE = ("many", "1e999", 10**30, -(10**9), 0.5, None, [1], True)


def odd_usage(kind: int, completion: dict) -> bytes:
    """A completion whose answer is good and whose usage is not."""
    completion["usage"] = {"prompt_tokens": "USAGE", "completion_tokens": 50}
    value = ODD_USAGE[kind % len(ODD_USAGE)]
    return json.dumps(completion).replace('"USAGE"', "1e999" if value == "1e999" else json.dumps(value)).encode()


def odd_body(kind: int, completion: dict) -> object:
    """As :func:`odd`, for the JSON object in a row of a batch."""
    return ("<html>", None, [], {"choices": {}}, completion | {"usage": {"prompt_tokens": -1}})[kind % 5]


class Script:
    def __init__(
        self, folder: Path, faults: bool, latency: float, key: str | None, no_schema: bool, model: str | None,
        named: list[str],
    ) -> None:  # fmt: skip
        self.folder, self.faults, self.latency, self.key = folder, faults, latency, key
        self.no_schema, self.model, self.named = no_schema, model, named
        self.times: Counter[str] = Counter()
        self.log = (folder / "log.jsonl").open("a", buffering=1, encoding="utf-8")
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.hold = folder / "hold"  # while this file exists, batches do not end

    def note(self, event: str, key: str, **more: object) -> None:
        self.log.write(json.dumps({"event": event, "key": key, **more}) + "\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": f"bad key {request.headers.get('Authorization')}"}}, status=401)
        body = await request.json()
        if self.model is not None and body["model"] != self.model:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if self.no_schema and "response_format" in body:
            return web.json_response({"error": {"message": "response_format is not supported"}}, status=400)
        if "picky" in self.named and (complaint := self.refuse(body)) is not None:
            return web.json_response({"error": complaint}, status=400)
        messages = body["messages"]
        key = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
        self.times[key] += 1
        first = self.times[key] == 1
        most = body.get("max_tokens") or body.get("max_completion_tokens")
        self.note("asked", key, messages=messages, auth=request.headers.get("Authorization"), most=most)
        if "silent" in self.named:
            await asyncio.sleep(3600)
        if "echo" in self.named:
            code = request.headers.get("Authorization").split()[1]
            return web.json_response({"error": {"message": code, "code": code, "type": code}}, status=400)
        chance = digest(key) % 100 if self.faults else 99
        if first and chance < 6:
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "1"})
        if first and chance < 12:
            return web.json_response({"error": {"message": "oops"}}, status=500)
        if first and chance < 18:
            request.transport.close()
            return web.Response()
        if first and chance < 21:
            await asyncio.sleep(3)  # longer than the client's patience
        await asyncio.sleep(self.latency + (0.3 if 21 <= chance < 26 else 0))
        completion = self.completion(body, key, chance)
        response = web.Response(body=self.spoil(body, completion), content_type="application/json")
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionResetError:  # of a client that was killed
            return response
        self.note("answered", key)
        return response

    def completion(self, body: dict, key: str, chance: int) -> dict:
        messages = body["messages"]
        kind = body["response_format"]["json_schema"]["name"] if "response_format" in body else self.guess(messages)
        user = messages[1]["content"].split("\n\nAn earlier answer")[0]  # as at the first time
        message: dict = {"role": "assistant", "content": json.dumps(answer(kind, user)), "refusal": None}
        reason = "stop"
        stubborn = self.faults and digest(messages[1]["content"]) % 40 == 0  # repairs do not help
        if self.faults and (len(messages) == 2 or stubborn):
            if 26 <= chance < 29 or (stubborn and len(messages) > 2):
                message["content"] = "As a language model, here it is: {"
            elif 29 <= chance < 32:
                reason, message["content"] = "length", message["content"][:20]
            elif 32 <= chance < 34 or stubborn:
                message["content"], message["refusal"] = None, "I cannot help with that."
        return {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {"prompt_tokens": 200, "completion_tokens": 50, "total_tokens": 250},
        }  # fmt: skip

    def refuse(self, body: dict) -> dict | None:
        """What OpenAI says of parameters that its reasoning models do not take, and of those that another server lacks."""
        for name in ("max_tokens", "temperature", "seed", "reasoning_effort"):
            if name in body and (body["model"] == "o3-mini" or name == "seed"):
                hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                message = f"Unsupported parameter: '{name}' is not supported with this model.{hint}"
                return {"message": message, "type": "invalid_request_error", "param": name, "code": "unsupported_parameter"}
        return None

    def spoil(self, body: dict, completion: dict) -> bytes:
        """The bytes of an answer, after the faults by name."""
        number = digest(body["messages"][1]["content"].split("\n\nAn earlier answer")[0])
        message = completion["choices"][0]["message"]
        if "odd" in self.named and number % 8 == 0:
            return odd(number // 8 % 18, completion)
        if "usage" in self.named:
            return odd_usage(number, completion)
        if "html" in self.named:
            return b"<html>Please log in</html>"
        if "empty" in self.named:
            return b""
        if "schema" in self.named:
            message["content"] = '{"thoughts": "none"}'
        if "thoughts" in self.named and body["model"] == "o3-mini" and self.most(body) < 16_000:
            completion["choices"][0] |= {"message": message | {"content": ""}, "finish_reason": "length"}
        if "greedy" in self.named:  # a token for each byte, and as many more as it may
            used = len(json.dumps([body["messages"], body["response_format"]], ensure_ascii=False).encode())
            completion["usage"] = {"prompt_tokens": used, "completion_tokens": self.most(body)}
            self.note("used", body["model"], prompt=used, completion=self.most(body))
        return json.dumps(completion).encode()

    def most(self, body: dict) -> int:
        return body.get("max_tokens") or body["max_completion_tokens"]

    @classmethod
    def reply(cls, messages: list) -> dict[str, str]:
        """What a well-behaved model answers."""
        return answer(cls.guess(messages), messages[1]["content"])

    @staticmethod
    def guess(messages: list) -> str:
        told = messages[0]["content"]
        for kind, word in (
            ("Contrasted", "two instructions"),
            ("Choices", "of two passages"),
            ("Poisoned", "near twins"),
            ("Written", "passage_1"),
            ("Choice", "three passages"),
            ("YesNo", "judge"),
        ):
            if word in told:
                return kind
        return "Instructed"

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        name = f"file-{len(self.files)}"
        self.files[name] = form["file"].file.read()
        return web.json_response(
            {
                "id": name,
                "object": "file",
                "bytes": 1,
                "created_at": 0,
                "filename": "x",
                "purpose": "batch",
                "status": "processed",
            }
        )

    async def download(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["file"]])

    def batch_json(self, name: str) -> dict:
        batch = self.batches[name]
        if batch["status"] == "in_progress" and not self.hold.exists():
            lines = []
            for line in self.files[batch["input_file_id"]].split(b"\n")[:-1]:
                row = json.loads(line)
                messages = row["body"]["messages"]
                key = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
                status, body = 200, self.completion(row["body"], key, 99)
                complaint = self.refuse(row["body"]) if "picky" in self.named else None
                if complaint is not None:
                    status, body = 400, {"error": complaint}
                elif "expired" in self.named and batch["number"] == 0 and len(lines) >= 3:
                    continue
                else:
                    self.note("asked", key, batch=name)
                response = {"status_code": status, "request_id": "q", "body": body}
                if "rows" in self.named:  # characters that end a line elsewhere
                    response["request_id"] = "q\u2028\x85\x0c"
                    if batch["number"] == 0 and len(lines) == 2:
                        lines.append('{"custom_id": "' + row["custom_id"] + '", "response": {"status_code": 200, "bo')
                        continue
                    if status == 200 and digest(key) % 8 == 0:
                        response["body"] = odd_body(digest(key) // 8, body)
                line = {"id": "r", "custom_id": row["custom_id"], "response": response, "error": None}
                lines.append(json.dumps(line, ensure_ascii=False))
                self.note("answered", key)
            if "rows" in self.named:
                other = json.dumps({"custom_id": "of another job", "response": {"status_code": 200, "body": {}}})
                lines = ["", "null", "[]", '{"custom_id": []}', other, *lines, "   ", "{" * 100_000, '"\\ud800"']
            self.files[f"out-{name}"] = "\n".join(lines).encode()
            batch |= {"status": "completed", "output_file_id": f"out-{name}"}
            if batch["number"] == 0 and "expired" in self.named:
                batch |= {"status": "expired"}
        return {
            "id": name,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "created_at": 0,
            **batch,
        }

    async def create_batch(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {
            "status": "in_progress",
            "input_file_id": body["input_file_id"],
            "metadata": body.get("metadata"),
            "number": len(self.batches),
        }
        size = len(self.files[body["input_file_id"]])
        self.note("submitted", name, size=size, lines=self.files[body["input_file_id"]].count(b"\n"))
        for state in ("failed", "cancelled"):
            if state in self.named and not self.batches[name]["number"]:
                error = {"code": "token_limit_exceeded", "message": "sk-secret"}
                self.batches[name] |= {"status": state, "errors": {"object": "list", "data": [error]}}
        waiting = sum(len(self.files[batch["input_file_id"]]) for batch in self.batches.values()
                      if batch["status"] == "in_progress")  # fmt: skip
        if "limit" in self.named and waiting > 60_000:
            error = {"code": "token_limit_exceeded", "message": "too many"}
            self.batches[name] |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
        if "lost" in self.named:
            return web.json_response({"error": {"message": "bad gateway"}}, status=502)
        if (self.folder / "die").exists():  # the job is there, but its id never reaches the client
            request.transport.close()
            return web.Response()
        return web.json_response({**self.batch_json(name)})

    async def get_batch(self, request: web.Request) -> web.Response:
        return web.json_response(self.batch_json(request.match_info["batch"]))

    async def list_batches(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [self.batch_json(name) for name in self.batches], "has_more": False}
        )


async def serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--no-schema", action="store_true")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--key")
    parser.add_argument("--model")
    parser.add_argument("--fault", action="append", default=[])
    arguments = parser.parse_args()
    script = Script(
        arguments.folder, arguments.faults, arguments.latency, arguments.key, arguments.no_schema, arguments.model,
        arguments.fault,
    )  # fmt: skip
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/chat/completions", script.complete)
    app.router.add_post("/v1/files", script.upload)
    app.router.add_get("/v1/files/{file}/content", script.download)
    app.router.add_post("/v1/batches", script.create_batch)
    app.router.add_get("/v1/batches", script.list_batches)
    app.router.add_get("/v1/batches/{batch}", script.get_batch)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    part = arguments.folder / "port.part"
    part.write_text(str(site._server.sockets[0].getsockname()[1]))
    part.rename(arguments.folder / "port")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
