"""The page as Gradio lays it out: which parts there are, and which step each of them starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from markupsafe import Markup

from llava.jobs.case_file import fill
from llava.serve.engine import Engine, Refusal
from llava.serve.page import views
from llava.serve.page.flow import Flow, Screen
from llava.serve.page.visits import Visits
from llava.serve.uploads import UploadLimits

log = logging.getLogger(__name__)
FILE_TYPES = ["image", "video", ".heic", ".heif", ".avif"]
SAVE = """(file) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([file.text], {type: file.type}));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""


def received(file: Mapping[str, Any] | None, folder: Path, limits: UploadLimits) -> tuple[bytes, str]:
    """Give content and name of a file in the folder of uploads; it is gone afterwards. Raises Refusal for any other."""
    path = Path(str((file or {}).get("path", ""))).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise Refusal(400, views.GONE)
    try:
        with path.open("rb") as stream:
            content = stream.read(limits.max_bytes + 1)
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # another upload of the same bytes may be there
            path.parent.rmdir()
    return content, str((file or {}).get("orig_name") or path.name)


def build_page(
    engines: Mapping[str, Engine],
    uploads: UploadLimits | None = None,
    examples: str | Path | None = None,
    is_allowed: Callable[[str | None], bool] | None = None,
    at_once: int = 16,
    is_remote: bool = False,
) -> gr.Blocks:
    """Give the page of some models.

    engines: of each model by its name; a mapping that is no dict is asked for its names whenever a page is opened.
    examples: folder that holds photos of `views.EXAMPLES`. is_allowed: whether a user who logged in may still ask;
    None where nobody logs in.
    at_once: steps of one kind that run at the same time; four times as many wait, further ones are refused.
    is_remote: the models are on other machines, and the page says so.
    """
    visits = Visits(on_forget=lambda name: page.state_holder.session_data.pop(name, None))  # Gradio's copy, too
    flow = Flow(engines, uploads, visits)
    with gr.Blocks(title="M2F2-Det", analytics_enabled=False, delete_cache=(30, 300)) as page:
        models = _models(engines)
        parts = _parts(_offered(examples), models, is_remote, has_login=is_allowed is not None)
        if not isinstance(engines, dict):
            present = partial(_present, engines, list(models))
            page.load(present, parts.model, parts.model, show_progress="hidden", api_visibility="private")
        _connect(parts, flow, is_allowed or (lambda user: True), uploads or UploadLimits())
    page.queue(default_concurrency_limit=at_once, max_size=4 * at_once)
    page.state_session_capacity = 200
    return page


class _Parts:
    """The components that steps change or read."""

    model: gr.Radio
    drop: gr.File
    notice: gr.HTML
    photo: gr.HTML
    faces: gr.Radio
    clear: gr.Button
    examples: list[tuple[gr.Button, Path]]
    offer: gr.Column
    seen: gr.Column
    result: gr.Column
    card: gr.HTML
    words: gr.HTML
    again: gr.Button
    talk: list[gr.Row]
    stop: gr.Button
    suggestions: list[gr.Button]
    question: gr.Textbox
    ask: gr.Button
    heatmap: gr.HTML
    html: gr.Button
    json: gr.Button
    say: gr.HTML

    @property
    def shown(self) -> list[Any]:
        """List what `_updates` gives, in its order."""
        first = [self.drop, self.photo, self.faces, self.card, self.words, self.heatmap, self.notice, self.say]
        asking = [self.stop, self.again, self.ask, self.question, *self.talk]
        return [*first, self.offer, self.seen, self.result, *asking]


def _parts(
    offered: Sequence[tuple[views.Example, Path]], models: Mapping[str, bool | None], is_remote: bool, has_login: bool
) -> _Parts:
    """Lay out the page. models: whether each writes words, by its name; none where they can not be asked for."""
    parts = _Parts()
    head = {"title": views.TITLE, "lead": views.lead(models.values()), "remark": views.remark(models)}
    gr.HTML(fill("live_head.html", **head), elem_id="head")
    parts.notice = gr.HTML("", elem_id="notice")
    parts.say = gr.HTML("", elem_id="say")
    with gr.Row(elem_id="desk", equal_height=False):
        with gr.Column(scale=5, min_width=280, elem_id="left"):
            _left(parts, offered, models)
        with gr.Column(scale=7, min_width=280, visible=False, elem_id="right") as parts.result:
            _right(parts)
    privacy = views.REMOTE_PRIVACY if is_remote else views.PRIVACY
    about = {"limits": views.limits(models.values()), "privacy": privacy, "has_login": has_login}
    gr.HTML(fill("live_about.html", **about), elem_id="about")
    return parts


def _left(parts: _Parts, offered: Sequence[tuple[views.Example, Path]], models: Mapping[str, bool | None]) -> None:
    """Lay out what is given: the picture and its faces, or the place to drop a file and the examples."""
    with gr.Column(visible=False, elem_id="seen") as parts.seen:
        parts.photo = gr.HTML("", elem_id="photo")
        parts.faces = gr.Radio([], label="Which face?", visible=False, interactive=True, elem_id="faces")
        parts.clear = gr.Button("Clear, take another", elem_id="clear", size="sm")
    parts.examples = []
    with gr.Column(elem_id="offer") as parts.offer:
        parts.model = _model_choice(models)
        parts.drop = gr.File(label=views.DROP, file_types=FILE_TYPES, height=220, elem_id="drop")
        if offered:
            gr.HTML(Markup("<h2>Or try one of these</h2>"))
            with gr.Row(elem_id="examples"):
                for example, path in offered:
                    with gr.Column(min_width=110):
                        gr.HTML(views.thumbnail(path, example.name))
                        parts.examples.append((gr.Button(example.name, size="sm"), path))
            gr.HTML(fill("live_credits.html", credits=dict.fromkeys(example.credit for example, _ in offered)))


def _model_choice(models: Mapping[str, bool | None], chosen: str | None = None) -> gr.Radio:
    """Offer the models, `chosen` or else the first one marked; there is nothing to choose where there is one."""
    choices = [(views.model_label(name, can_write), name) for name, can_write in models.items()]
    marked = chosen if chosen in models else next(iter(models), None)
    return gr.Radio(choices, value=marked, label="Which model?", visible=len(models) > 1, elem_id="model")


def _models(engines: Mapping[str, Engine]) -> dict[str, bool | None]:
    """Say which models are there now, and whether each writes words; none where they can not be asked for."""
    try:
        if isinstance(engines, dict):
            return {name: engine.has_words for name, engine in engines.items()}
        return dict.fromkeys(engines)
    except ConnectionError as error:
        log.warning("The page has no model: %s", error)
        return {}


def _present(engines: Mapping[str, Engine], before: Sequence[str], chosen: str | None) -> Any:
    """Offer the models that are there now; nothing changes where they are those that were there `before`."""
    models = _models(engines)
    return gr.skip() if list(models) == list(before) and chosen in models else _model_choice(models, chosen)


def _right(parts: _Parts) -> None:
    """Lay out what is found: verdict, reasons, questions, map and report."""
    parts.card = gr.HTML("", elem_id="card")
    with gr.Tabs(elem_id="tabs"):
        with gr.Tab("Explanation"):
            parts.words = gr.HTML("", elem_id="words")
            with gr.Row(elem_classes="actions") as actions:
                parts.stop = gr.Button("Stop", size="sm", visible=False, elem_id="stop")
                parts.again = gr.Button("Regenerate", size="sm", elem_id="again")
            with gr.Row(elem_id="asking") as asking:
                parts.question = gr.Textbox(
                    label="Ask about this face", placeholder="Why?", lines=1, max_lines=4, max_length=2000, scale=5
                )
                parts.ask = gr.Button("Ask", variant="primary", scale=1, min_width=90, elem_id="ask")
            with gr.Row(elem_id="suggestions") as suggestions:
                parts.suggestions = [gr.Button(question, size="sm") for question in views.SUGGESTIONS]
            parts.talk = [actions, asking, suggestions]
        with gr.Tab("Heatmap"):
            parts.heatmap = gr.HTML("", elem_id="heatmap")
    with gr.Row(elem_id="report"):
        parts.html = gr.Button("Save report (page)", size="sm", elem_id="save-html")
        parts.json = gr.Button("Save report (JSON)", size="sm", elem_id="save-json")


class _Steps:
    """What starts at what a person does, where that person may still ask, and how the page changes then."""

    def __init__(self, parts: _Parts, is_allowed: Callable[[str | None], bool]) -> None:
        self._is_allowed = is_allowed
        self._common = {"outputs": parts.shown, "show_progress": "hidden", "api_visibility": "private"}

    def on(self, listen: Any, step: Callable[..., Iterator[Screen]], *inputs: Any, **options: Any) -> None:
        """Start a step with the name of the page and the values of `inputs`."""

        def run(request: gr.Request, *given: Any) -> Iterator[list[Any]]:
            yield from self._screens(request, step, *given)

        listen(run, inputs=list(inputs), **self._common, **options)

    def on_choice(self, listen: Any, step: Callable[..., Iterator[Screen]]) -> None:
        """Start a step with the name of the page and what was chosen, also while an earlier choice is answered.

        The event itself is asked: the value that Gradio keeps beside it may be overwritten by a late update.
        """

        def run(request: gr.Request, choice: gr.EventData) -> Iterator[list[Any]]:
            yield from self._screens(request, step, _chosen(choice))

        listen(run, inputs=None, trigger_mode="multiple", **self._common)

    def _screens(self, request: gr.Request, step: Callable[..., Iterator[Screen]], *given: Any) -> Iterator[list[Any]]:
        if not self._is_allowed(getattr(request, "username", None)):
            yield _updates(Screen(notice=views.LOCKED, say=views.LOCKED, is_busy=False))
            return
        for screen in step(request.session_hash or "", *given):
            yield _updates(screen)


def _chosen(choice: gr.EventData) -> Any:
    """Give what was chosen, None where a request does not say it."""
    try:
        return choice.value
    except (AttributeError, TypeError):
        return None


def _connect(parts: _Parts, flow: Flow, is_allowed: Callable[[str | None], bool], uploads: UploadLimits) -> None:
    folder, steps = Path(get_upload_folder()).resolve(), _Steps(parts, is_allowed)
    steps.on(
        parts.drop.upload,
        lambda page, file, model: flow.look(page, model, partial(received, file, folder, uploads)),
        parts.drop,
        parts.model,
        preprocess=False,
    )
    for button, path in parts.examples:
        steps.on(
            button.click,
            lambda page, model, path=path: flow.look(page, model, lambda: (path.read_bytes(), path.name)),
            parts.model,
        )
    steps.on_choice(parts.faces.select, flow.choose)
    steps.on(parts.ask.click, flow.ask, parts.question)
    steps.on(parts.question.submit, flow.ask, parts.question)
    for button in parts.suggestions:
        steps.on(button.click, lambda page, question=button.value: flow.ask(page, question))
    steps.on(parts.again.click, flow.again)
    steps.on(parts.stop.click, flow.stop)
    steps.on(parts.clear.click, flow.clear)
    for button, kind in ((parts.html, "html"), (parts.json, "json")):
        save = _saving(flow, kind, is_allowed)
        file = gr.JSON(visible=False)
        made = button.click(save, None, file, show_progress="hidden", api_visibility="private")
        made.success(None, file, None, js=SAVE)


def _saving(flow: Flow, kind: str, is_allowed: Callable[[str | None], bool]) -> Callable[..., dict[str, str]]:
    """Give what makes a report; a sentence is shown where it cannot be made."""

    def save(request: gr.Request) -> dict[str, str]:
        if not is_allowed(getattr(request, "username", None)):
            raise gr.Error(views.LOCKED)
        try:
            return flow.report(request.session_hash or "", kind)
        except Refusal as error:
            raise gr.Error(str(error)) from None

    return save


def _updates(screen: Screen) -> list[Any]:
    """Turn what changes into what Gradio sends, in the order of `_Parts.shown`."""

    def html(part: str | None) -> Any:
        return gr.skip() if part is None else str(part)

    faces = gr.skip() if screen.face is None else gr.Radio(value=screen.face)
    if screen.faces is not None:
        choices = [(f"Face {n + 1}{', the largest' if n == 0 else ''}", n) for n in range(screen.faces)]
        faces = gr.Radio(choices=choices, value=screen.face, visible=screen.faces > 1)
    opened = [gr.skip()] * 3
    if screen.is_open is not None:
        opened = [gr.Column(visible=visible) for visible in (not screen.is_open, screen.is_open, screen.is_open)]
    busy = [gr.skip()] * 3
    if screen.is_busy is not None:
        is_idle = not screen.is_busy
        busy = [gr.Button(visible=screen.is_busy), gr.Button(visible=is_idle), gr.Button(interactive=is_idle)]
    drop = None if screen.is_open is not None or screen.notice else gr.skip()
    first = [drop, html(screen.photo), faces, html(screen.card), html(screen.words), html(screen.heatmap)]
    notice = None if screen.notice is None else fill("live_notice.html", text=screen.notice)
    say = None if screen.say is None else fill("live_say.html", text=screen.say)
    talk = [gr.skip() if screen.has_words is None else gr.Row(visible=screen.has_words) for _ in range(3)]
    return [*first, html(notice), html(say), *opened, *busy, html(screen.question), *talk]


def _offered(folder: str | Path | None) -> list[tuple[views.Example, Path]]:
    """List the examples that are there."""
    if folder is None:
        return []
    found = [(e, path) for e in views.EXAMPLES if (path := Path(folder) / e.file).is_file()]
    log.info("The page offers %d of %d examples", len(found), len(views.EXAMPLES))
    return found
