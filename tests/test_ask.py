"""Ask: off wherever a stranger could reach it, lazy, escaped, and answered by the very models of the run."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import tiny_runs
from conftest import make_tiny_llama

from lib import ask, browse, config, generate
from lib.config import Parameters
from lib.generate import Question


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Parameters:
    folder = tmp_path_factory.mktemp("ask")
    p, _ = tiny_runs.train_undisturbed(make_tiny_llama(folder / "model"), folder / "results")
    return p.model_copy(update={"max_new_tokens": 6})


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Someone at the kernel of a Jupyter on loopback."""
    for name in [n for n in os.environ if n.startswith("JUPYTERHUB_") or n == "SERVER_SOFTWARE"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(browse, "live", lambda: True)
    monkeypatch.setattr(ask, "server_address", lambda: "127.0.0.1")
    return monkeypatch


def test_it_is_off_wherever_a_stranger_could_ask(trained: Parameters, lab: pytest.MonkeyPatch) -> None:
    assert ask.why_off(trained) is None
    for address in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        lab.setattr(ask, "server_address", lambda address=address: address)
        assert "not on loopback" in str(ask.why_off(trained)), address
    for address in ("localhost", "::1"):
        lab.setattr(ask, "server_address", lambda address=address: address)
        assert ask.why_off(trained) is None, address
    lab.setattr(ask, "server_address", lambda: None)
    assert "could not be told" in str(ask.why_off(trained))
    lab.setenv("JUPYTERHUB_USER", "a")
    assert "JupyterHub" in str(ask.why_off(trained))
    lab.setenv("SERVER_SOFTWARE", "voila/0.5.13")
    assert "Voilà" in str(ask.why_off(trained))


def test_a_kernel_without_a_server_of_its_own_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    assert ask.server_address() is None


def test_the_address_is_that_of_the_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter's own note says localhost for a server that was told to listen everywhere (`--ip='*'`)."""
    for ip in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server((ip, 0)) as listening:
            note = {"pid": os.getpid(), "hostname": "localhost", "port": listening.getsockname()[1], "sock": ""}
            monkeypatch.setenv("JPY_PARENT_PID", str(os.getpid()))
            monkeypatch.setattr("jupyter_server.serverapp.list_running_servers", lambda note=note: [note])
            assert ask.server_address() == ip
    assert ask.server_address() is None, "nothing listens any more"


def test_without_a_reader_or_checkpoints_it_says_so(trained: Parameters, lab: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "holds no checkpoint" in str(ask.why_off(trained.model_copy(update={"results_dir": str(tmp_path)})))
    lab.setattr(browse, "live", lambda: False)
    assert "JupyterLab" in str(ask.why_off(trained))


def test_both_answers_are_those_that_the_run_itself_draws(trained: Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ask.Ask(trained)
    assert made.sampler is None
    made.button.click()
    assert made.sampler is None, "an empty question loads no model"
    assert "Type a question" in made.status.value
    made.question.value = " <b>why</b>? "
    made.step.value = 7
    made.button.click()
    rows = [generate.Row(step, Question("asked", "asked", "<b>why</b>?"), 0) for step in (0, 7)]
    expected = made.sampler.answer(rows)
    assert f">{expected[0]['n_tokens']} tokens" in made.left.value.replace("<small>", ">")
    assert "checkpoint 7" in made.right.value
    first = made.right.value
    made.button.click()
    assert made.asked == 2
    assert made.right.value != first or expected[1]["n_tokens"] == 0
    hostile = {"response": "<img src=x onerror=alert(1)> kill him", "n_tokens": 3, "finish_reason": "length"}
    monkeypatch.setattr(made.sampler, "answer", lambda _rows: [hostile, hostile])
    made.button.click()
    assert "<img" not in made.left.value
    assert "<details><summary>" in made.right.value
    assert not made.button.disabled


def test_a_run_that_cannot_be_loaded_is_told_in_a_line(trained: Parameters) -> None:
    made = ask.Ask(trained.model_copy(update={"model_name": str(config.run_dir(trained))}))
    made.question.value = "why?"
    made.button.click()
    assert made.status.value
    assert "Loading" not in made.status.value
    assert not made.button.disabled
