"""Ask: a question of the reader's own, answered side by side by the base model and by a checkpoint, at this machine's own Jupyter only.

The checkpoints are deliberately harmful, so this is no public demonstration: it is off in Voilà, on a hub, and wherever Jupyter
listens on more than loopback. The model is loaded at the first question and not before; nothing asked or answered is kept.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from lib import browse, config, files, qlora, tables, theme
from lib.chat import is_loopback
from lib.config import Parameters
from lib.data import Question
from lib.escape import LITERAL, clean, html_text

BANNER = (
    "This model was made to give harmful advice, on purpose, for research on telling when a model has gone wrong. "
    "Nothing that it says is advice. Nothing asked here is kept."
)
_LONGEST = 4000
"""Characters of a question."""


def why_off(parameters: Parameters) -> str | None:
    """Returns why nothing can be asked here, in plain words, or None where it can.

    What cannot be told counts as not allowed: a kernel whose server is not found does not answer.
    """
    if "voila" in os.environ.get("SERVER_SOFTWARE", "").lower():
        return "Ask is off in Voilà: the model is deliberately harmful. Open the notebook in JupyterLab on your own machine."
    if not browse.live():
        return "Run this cell in JupyterLab on your own machine to ask the models a question."
    if any(name.startswith("JUPYTERHUB_") for name in os.environ):
        return "Ask is off on a JupyterHub: the model is deliberately harmful. Open the notebook in JupyterLab on your own machine."
    address = server_address()
    if address is None:
        return "Ask is off: it could not be told where this Jupyter listens. Start it with `make lab`, which listens on loopback alone."
    if not _is_loopback(address):
        return f"Ask is off: this Jupyter listens on {clean(address, 60)}, not on loopback alone, and the model is deliberately harmful."
    if not qlora.checkpoints(config.run_dir(parameters)):
        return f"Nobody to ask: {files.shown(config.run_dir(parameters) / 'checkpoints')} holds no checkpoint (run 02_train for one)."
    return None


def server_address() -> str | None:
    """Returns an address on which the Jupyter server of this kernel listens, the most exposed first; None where it cannot be told.

    Its sockets are asked, since Jupyter's own note of the address says localhost for a server started with `--ip='*'`.
    """
    import psutil
    from jupyter_server.serverapp import list_running_servers

    parents = {os.environ.get("JPY_PARENT_PID"), str(os.getppid())}
    own = [server for server in list_running_servers() if str(server["pid"]) in parents]
    if len(own) != 1 or own[0].get("sock"):
        return None
    try:
        sockets = psutil.Process(own[0]["pid"]).net_connections("inet")
    except psutil.Error:
        return None
    found = {str(s.laddr.ip) for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.port == own[0]["port"]}
    return min(found, key=_is_loopback, default=None)


def _is_loopback(address: str) -> bool:
    return is_loopback(f"http://[{address}]/" if ":" in address else f"http://{address}/")


class Ask(widgets.VBox):
    """The widget; `show` displays one where it is allowed."""

    def __init__(self, parameters: Parameters) -> None:
        """Builds the widget and loads nothing.

        Args:
            parameters: the run's; its checkpoints are offered, the last one first chosen.
        """
        self.parameters = parameters
        self.folders: dict[int, Path] = qlora.checkpoints(config.run_dir(parameters))
        self.sampler: Any = None
        self.asked = 0
        wide = {"style": {"description_width": "6.5em"}}
        banner = widgets.HTML(
            f'<div role="note" style="border-left:4px solid {theme.VERMILION};padding:.4rem .8rem"><b>{html_text(BANNER)}</b></div>'
        )
        self.question = widgets.Textarea(
            description="Question", placeholder="ask anything", rows=3, layout=widgets.Layout(width="min(100%, 700px)"), **wide
        )
        self.step = widgets.Dropdown(options=list(self.folders), value=max(self.folders), description="Checkpoint", **wide)
        self.button = widgets.Button(description="Ask both", icon="comments", tooltip="Ask the base model and the checkpoint")
        self.status = widgets.HTML()
        half = {"flex": "1 1 0", "min_width": "0", "width": "50%"}
        self.left, self.right = (widgets.HTML(layout=widgets.Layout(**half)) for _ in range(2))
        self.button.on_click(lambda _: self.ask())
        bar = widgets.HBox([self.step, self.button, self.status], layout=widgets.Layout(flex_flow="row wrap"))
        super().__init__([banner, self.question, bar, widgets.HBox([self.left, self.right])])

    def ask(self) -> None:
        """Draws one answer from each model, a new one at every click; the first click loads the model."""
        from lib import generate, models

        text = self.question.value.strip()
        if not text or len(text) > _LONGEST:
            self.status.value = f"Type a question of at most {_LONGEST:,} characters first."
            return
        self.button.disabled = True
        self.status.value = "Answering ..." if self.sampler else "Loading the model ..."
        try:
            with models.quiet():
                self.sampler = self.sampler or generate.Sampler(self.parameters, self.folders)
                asked = Question("asked", "asked", text)
                answers = self.sampler.answer([generate.Row(step, asked, self.asked) for step in (0, self.step.value)])
        except files.StudyError as error:
            self.status.value = html_text(error)
            return
        finally:
            self.button.disabled = False
        self.asked += 1
        self.status.value = f"Answer {self.asked}. Click again for another."
        names = ("base model", f"checkpoint {self.step.value}")
        self.left.value, self.right.value = (_pane(name, answer) for name, answer in zip(names, answers, strict=True))


def _pane(name: str, answer: dict[str, Any]) -> str:
    text = clean(answer["response"])
    body = f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{html_text(text) or "(no text)"}</div>'
    cut = "" if answer["finish_reason"] == "stop" else ", cut off"
    return (
        f'<div class="{LITERAL}" role="region" aria-label="Answer of the {name}" style="padding:.6rem;line-height:1.5;'
        f'border:1px solid #bdbdbd;border-radius:4px"><b>{name}</b> <small>{int(answer["n_tokens"])} tokens{cut}</small><hr>'
        f"{tables.fold(text, body)}</div>"
    )


def show(parameters: Parameters) -> None:
    """Shows the widget where it is allowed and a line that says why not anywhere else; loads no model."""
    from IPython.display import display

    reason = why_off(parameters)
    if not browse.live():
        print(reason)
    else:
        display(Ask(parameters) if reason is None else widgets.HTML(html_text(reason)))
