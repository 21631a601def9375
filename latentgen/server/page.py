"""The page for people, made with Gradio and served by the same process.

It puts jobs into the same queue as the APIs. A job that was begun here goes on when the page is
closed; its pictures are in the gallery. Nothing it needs comes from elsewhere.
"""

from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from .. import lorafolder, metadata, schedulers
from ..errors import InvalidRequest
from .drawing import Drawing, LoraChoice, checked
from .jobs import JobState, QueueFull
from .service import Service
from .settings import Settings

__all__ = ["mount"]

SHOWN = 60  # pictures of the gallery at once
PREVIEWS = 8
SYSTEM_FONTS = ["system-ui", "sans-serif"]
CSS = """
.gradio-container {max-width: 72rem !important; width: 100% !important; margin: auto}
.gradio-container main, .gradio-container .tabitem {width: 100% !important}
footer {display: none !important}
#told {min-height: 1.6rem}
#results .grid-wrap, #gallery .grid-wrap {max-height: none !important; height: auto !important}
"""

# The settings, in the order in which they are kept and handed around.
FIELDS = (
    "prompt",
    "negative_prompt",
    "model",
    "scheduler",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "num_images",
    "width",
    "height",
    "loras",
    "lora_weight",
    "strength",
    "output_format",
)


def mount(app: FastAPI, settings: Settings) -> FastAPI:
    """Serve the page at `/` of an application whose state has the service."""
    page = build(settings, lambda: app.state.service)
    theme = gr.themes.Soft(font=SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        css=CSS,
        footer_links=[],
        show_error=True,  # ours are sentences; `told_plainly` sees to the others
        allowed_paths=[str(settings.outputs.resolve())],
        max_file_size=settings.max_body,
        ssr_mode=False,
    )


def build(settings: Settings, service: Callable[[], Service]) -> gr.Blocks:
    """The page's parts, and what happens when they are used."""
    models = settings.models()
    usual = next(iter(models.values()))
    with gr.Blocks(title="latentgen", analytics_enabled=False) as page:
        job_id, begun = gr.State(None), gr.State(None)
        listed, limit = gr.State([]), gr.State(SHOWN)
        with gr.Tab("Draw", id="draw"), gr.Row():
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(
                    label="Prompt", placeholder="a red apple", lines=2, elem_id="prompt"
                )
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw-button")
                    cancel = gr.Button("Cancel", interactive=False, elem_id="cancel-button")
                negative = gr.Textbox(label="Negative prompt", lines=1)
                with gr.Row():
                    seed = gr.Textbox(label="Seed", placeholder="random", min_width=120)
                    again = gr.Button("Same seed again", min_width=120, elem_id="again-button")
                    count = gr.Slider(1, settings.max_images, 1, step=1, label="Pictures")
                with gr.Accordion("Start from a picture", open=False):
                    gr.Markdown("It is redrawn as a whole, or only where you paint.")
                    editor = gr.ImageEditor(
                        type="pil",
                        format="png",
                        label="Picture",
                        sources=["upload", "clipboard"],
                        transforms=("crop",),
                        brush=gr.Brush(colors=["#ff00aa"], default_size=24, color_mode="fixed"),
                        layers=False,
                        elem_id="editor",
                    )
                    mask = gr.Image(
                        type="pil",
                        image_mode="L",
                        sources=["upload", "clipboard"],
                        label="A mask instead of painting: white is redrawn",
                        elem_id="mask",
                    )
                    strength = gr.Slider(0.05, 1, 0.8, step=0.05, label="How much to change")
                with gr.Accordion("Settings", open=False):
                    model = gr.Dropdown(list(models), value=usual.name, label="Model")
                    scheduler = gr.Dropdown(
                        [("the model's own", ""), *schedulers.NAMES],
                        value="",
                        label="Scheduler",
                        allow_custom_value=True,
                    )
                    steps = gr.Slider(
                        1, settings.max_steps, usual.num_inference_steps, step=1, label="Steps"
                    )
                    guidance = gr.Slider(1, 20, usual.guidance_scale, step=0.5, label="Guidance")
                    with gr.Row():
                        width = gr.Number(usual.width, label="Width", precision=0, min_width=100)
                        height = gr.Number(usual.height, label="Height", precision=0, min_width=100)
                    loras = gr.Dropdown(
                        list(lorafolder.names_there()), label="LoRAs", multiselect=True
                    )
                    lora_weight = gr.Slider(-1, 2, 1, step=0.05, label="LoRA weight")
                    format = gr.Radio(["png", "jpeg", "webp"], value="png", label="Format")
            with gr.Column(scale=6, min_width=320):
                told = gr.Markdown(elem_id="told")
                results = gr.Gallery(
                    label="Pictures",
                    columns=2,
                    object_fit="contain",
                    format="png",
                    elem_id="results",
                    buttons=["download", "fullscreen"],
                )
        with gr.Tab("Gallery", id="gallery") as gallery_tab, gr.Row():
            with gr.Column(scale=6, min_width=320):
                gallery = gr.Gallery(
                    label="All pictures, the newest first",
                    columns=5,
                    format="png",
                    object_fit="contain",
                    elem_id="gallery",
                    buttons=["download", "fullscreen"],
                )
                more = gr.Button("Show more", elem_id="more-button")
            with gr.Column(scale=4, min_width=320):
                facts = gr.Textbox(label="Its settings", lines=8, interactive=False)
                use = gr.Button("Use these settings", interactive=False, elem_id="use-button")
                delete = gr.Button("Delete", variant="stop", interactive=False)
                chosen = gr.State(None)
        with gr.Tab("Settings of a picture", id="read"):
            dropped = gr.File(
                label="Drop a picture with metadata: ours, or the WebUI's",
                file_types=["image"],
                elem_id="dropped",
            )
            dropped_facts = gr.Textbox(label="Its settings", lines=8, interactive=False)
            use_dropped = gr.Button("Use these settings", interactive=False)

        form = [
            prompt,
            negative,
            model,
            scheduler,
            steps,
            guidance,
            seed,
            count,
            width,
            height,
            loras,
            lora_weight,
            strength,
            format,
        ]

        async def start(
            painted: Any, sent_mask: Image.Image | None, *values: Any
        ) -> AsyncIterator[dict[Any, Any]]:
            """Draw what the form says, and show how it goes."""
            drawing, image, painted_mask = told_plainly(read_form, values, painted)
            wanted = sent_mask if sent_mask is not None else painted_mask
            try:
                job = await service().submit(drawing, image, wanted)
            except InvalidRequest as error:
                raise gr.Error(str(error), print_exception=False) from None
            except QueueFull:
                raise gr.Error(
                    "Too many jobs wait; try again soon", print_exception=False
                ) from None
            yield {
                told: "In the queue …",
                job_id: job.id,
                draw: gr.update(interactive=False),
                cancel: gr.update(interactive=True),
            }
            async for state in service().live.follow(job.id):
                yield {told: how_it_goes(service(), state), **shown(service(), state)}
            yield {job_id: None, begun: str(job.seeds[0])}

        def shown(service: Service, state: JobState) -> dict[Any, Any]:
            if state.status == "done":
                return {results: [str(file.resolve()) for file in service.pictures(state)]}
            progress = service.live.running.get(state.id)
            if progress is not None and progress.previews:
                return {results: [Image.open(io.BytesIO(progress.previews[-1]))]}
            return {}

        async def stop(id: str | None) -> None:
            if id is not None:
                await service().live.cancel(id)

        def pictures(limit: int) -> tuple[list[str], list[str]]:
            names, root = service().gallery(limit), settings.outputs.resolve()
            return [str(root / name) for name in names], names

        def choose(names: list[str], event: gr.SelectData) -> tuple[Any, ...]:
            name = names[event.index]
            able = gr.update(interactive=True)
            return name, describe(settings.outputs / name), able, able

        def fill(file: str | Path) -> list[Any]:
            """The form, with the settings of a picture."""
            values = told_plainly(settings_of, Path(file), settings)
            return [values.get(name, gr.skip()) for name in FIELDS]

        async def remove(name: str | None, limit: int) -> tuple[Any, ...]:
            if name is not None:
                state = service().jobs.get(Path(name).name[:36])
                file = service().picture(name)
                if state is not None and len(state.job.seeds) == 1:
                    await service().delete(state)
                elif file is not None:
                    file.unlink(missing_ok=True)
            off = gr.update(interactive=False)
            return *pictures(limit), None, "", off, off

        everything = [told, results, job_id, begun, draw, cancel]
        gr.on(
            [draw.click, prompt.submit],
            start,
            [editor, mask, *form],
            everything,
            concurrency_limit=None,
            show_progress="hidden",
        ).then(
            lambda: (gr.update(interactive=True), gr.update(interactive=False)),
            None,
            [draw, cancel],
        )
        cancel.click(stop, job_id, None, concurrency_limit=None)
        again.click(lambda seed: seed if seed is not None else gr.skip(), begun, seed)
        gr.on([gallery_tab.select, page.load], pictures, limit, [gallery, listed])
        more.click(lambda limit: limit + SHOWN, limit, limit).then(
            pictures, limit, [gallery, listed]
        )
        page.load(lambda: gr.update(choices=list(lorafolder.names_there())), None, loras)
        gallery.select(choose, listed, [chosen, facts, use, delete])
        use.click(lambda name: fill(settings.outputs / name), chosen, form)
        delete.click(remove, [chosen, limit], [gallery, listed, chosen, facts, use, delete])
        dropped.change(
            lambda file: (
                describe(Path(file)) if file else "",
                gr.update(interactive=bool(file)),
            ),
            dropped,
            [dropped_facts, use_dropped],
        )
        use_dropped.click(fill, dropped, form)
    return page


def told_plainly(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work`; what it refuses is shown as a sentence, never as a trace."""
    try:
        return work(*arguments)
    except (InvalidRequest, ValueError) as error:
        text = str(error).splitlines()[0]
        raise gr.Error(text, print_exception=False) from None


def read_form(
    values: tuple[Any, ...], editor_value: Any
) -> tuple[Drawing, Image.Image | None, Image.Image | None]:
    """What the form asks for, and the picture and the mask of the editor."""
    form = dict(zip(FIELDS, values, strict=True))
    image, mask = read_editor(editor_value)
    seed = str(form["seed"] or "").strip()
    if seed and not seed.isdecimal():
        raise InvalidRequest("seed", seed, "a whole number, or nothing for a random one")
    weight = form.pop("lora_weight")
    form["loras"] = [LoraChoice(name=name, weight=weight) for name in form["loras"] or []]
    form["seed"] = int(seed) if seed else None
    form["prompt"] = form["prompt"] or ""
    for name in ("negative_prompt", "scheduler"):
        form[name] = form[name] or None
    if image is None:
        form["strength"] = None
    else:  # the picture says its size
        form["width"] = form["height"] = None
    for name in ("width", "height", "num_inference_steps", "num_images"):
        form[name] = int(form[name]) if form[name] is not None else None
    return checked(Drawing, form | {"previews": PREVIEWS}), image, mask


def read_editor(value: Any) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture in the editor, and a mask, white where it was painted on."""
    background = value.get("background") if isinstance(value, dict) else None
    if background is None:
        return None, None
    mask = Image.new("L", background.size, 0)
    for layer in value.get("layers") or ():
        alpha = layer.convert("RGBA").getchannel("A").resize(background.size)
        mask.paste(255, mask=alpha.point(lambda value: 255 if value > 0 else 0))
    return background, mask if mask.getbbox() is not None else None


def how_it_goes(service: Service, state: JobState) -> str:
    """A line about a job."""
    if state.status == "failed":
        return f"**It failed:** {service.settings.told(state.error or '')}"
    if state.status == "cancelled":
        return "Cancelled."
    if state.status == "done":
        seconds = state.result["seconds"] if state.result is not None else 0.0
        seeds = ", ".join(str(seed) for seed in state.job.seeds)
        return f"Done in {seconds:.1f} s, seed {seeds}"
    progress = service.live.running.get(state.id)
    if progress is None or not progress.total:
        if not service.live.ready.is_set():
            return "The model is being loaded …"
        return f"In the queue, {service.open} job(s) in all …"
    left = progress.seconds_left
    rest = f", {left:.0f} s left" if left is not None else ""
    return f"Step {progress.index} of {progress.total}{rest}"


def describe(file: Path) -> str:
    """What a picture tells of itself."""
    try:
        text = metadata.read(file).infotext
    except InvalidRequest as error:
        return str(error.hint)
    return text if text is not None else "It tells no settings."


def settings_of(file: Path, settings: Settings) -> dict[str, Any]:
    """The fields of the form that a picture tells.

    Raises:
        InvalidRequest: it tells none.
    """
    text = metadata.read(file).infotext
    found = metadata.parse_infotext(text or "")
    if not found.fields:
        raise InvalidRequest("picture", file.name, "it tells no settings")
    here = lorafolder.names_there()
    _, tags = lorafolder.take_tags([found.prompt])
    known = {tag.name: tag.weight for tag in tags if tag.name in here}
    prompt = found.prompt
    for tag in tags:  # those that are here go into their own field
        prompt = prompt.replace(tag.tag, "") if tag.name in here else prompt
    values: dict[str, Any] = {
        "prompt": prompt.strip(),
        "negative_prompt": found.negative_prompt,
        "loras": list(known),
    }
    if known:
        values["lora_weight"] = next(iter(known.values()))
    for name, key, kind in (
        ("num_inference_steps", "Steps", int),
        ("guidance_scale", "CFG scale", float),
        ("seed", "Seed", str),
        ("strength", "Denoising strength", float),
    ):
        if key in found.fields:
            values[name] = kind(found.fields[key])
    width, _, height = found.fields.get("Size", "").partition("x")
    if width.isdecimal() and height.isdecimal():
        values |= {"width": int(width), "height": int(height)}
    sampler = " ".join(
        filter(None, (found.fields.get("Sampler"), found.fields.get("Schedule type")))
    )
    try:
        values["scheduler"] = str(schedulers.parse(sampler))
    except InvalidRequest:
        values["scheduler"] = ""
    if found.fields.get("Model") in settings.models():
        values["model"] = found.fields["Model"]
    return values
