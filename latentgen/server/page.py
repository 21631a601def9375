"""The page for people, made with Gradio and served by the same process.

It puts jobs into the same queue as the APIs. A job that was begun here goes on when the page is
closed; its pictures are in the gallery. Nothing it needs comes from elsewhere.

Gradio does more than this page wants: it fetches URLs, copies every picture that it shows, decodes
every picture that it gets, and prints traces. `mount` puts other functions in the place of those:
a subclass would not do, Gradio would write a stub beside this file.
"""

from __future__ import annotations

import base64
import functools
import html
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI, HTTPException
from gradio import processing_utils, route_utils, routes
from gradio.components.gallery import GalleryData, GalleryImage
from gradio.data_classes import ImageData
from gradio.exceptions import InvalidPathError
from PIL import Image

from .. import controlnet, lorafolder, metadata, schedulers
from ..errors import InvalidRequest
from ..lorafolder import LoraUse
from ..request import Request
from .drawing import Drawing, LoraChoice, checked, open_picture, size_of
from .jobs import JobState, QueueFull
from .log import without_values
from .service import Service, Sketch
from .settings import Settings

__all__ = ["mount"]

SHOWN = 60  # pictures of the gallery at once
PREVIEWS = 8
UPLOADS_LAST = 3600  # seconds
UNUSED = ("deep_link", "process_recording")  # would keep forms and films that nobody deletes
SYSTEM_FONTS = ["system-ui", "sans-serif"]
CSS = """
.gradio-container {max-width: 72rem !important; width: 100% !important; margin: auto}
.gradio-container main, .gradio-container .tabitem {width: 100% !important}
footer {display: none !important}
#told {min-height: 1.6rem}
#results .grid-wrap, #gallery .grid-wrap {max-height: none !important; height: auto !important}
"""

log = logging.getLogger(__name__)
_GET_FUNCTION = route_utils.get_fn

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
    "mask_blur",
    "padding_mask_crop",
    "controlnet",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "eta",
    "guidance_rescale",
    "output_format",
)
OF_CONTROL = FIELDS[-7:-3]
# Those of them that a request has in the same way.
SAME = (
    "num_inference_steps",
    "guidance_scale",
    "width",
    "height",
    "strength",
    "mask_blur",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "eta",
    "guidance_rescale",
)


def mount(app: FastAPI, settings: Settings) -> FastAPI:
    """Serve the page at `/` of an application whose state has the service."""
    uploads = settings.data_dir.resolve() / "uploads"
    os.environ["GRADIO_TEMP_DIR"] = routes.DEFAULT_TEMP_DIR = str(uploads)
    restrain()
    for name in UNUSED:
        app.api_route(f"/gradio_api/{name}", methods=["GET", "POST"], include_in_schema=False)(gone)
    page = build(settings, lambda: app.state.service).queue(max_size=settings.max_queue)
    theme = gr.themes.Soft(font=SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,  # what `plainly` makes of errors is shown nevertheless
        max_file_size=settings.max_body,
        ssr_mode=False,
        app_kwargs={"lifespan": functools.partial(emptied, uploads)},
    )
    page.has_launched = True  # else Gradio opens any file of this machine that a request names
    return app


def restrain() -> None:
    """Replace what Gradio does with what comes in, and with pictures that are shown.

    It asks the classes again and again, also for new components: theirs are the functions.
    """
    for name in (
        "async_ssrf_protected_get",
        "async_ssrf_protected_download",
        "ssrf_protected_download",
        "save_url_to_cache",
        "unsafe_download",
    ):
        setattr(processing_utils, name, refuse_url)
    routes.secure_url_stream_response = refuse_url
    route_utils.get_fn = a_function
    for component in (gr.ImageEditor, gr.Image, gr.File):
        component.preprocess = as_sent
    gr.ImageEditor.accept_blobs = None  # a way to send pictures that would stay in memory
    gr.Gallery.postprocess = by_address


def refuse_url(*_arguments: Any, **_options: Any) -> NoReturn:
    """In place of fetching what a request names: who may ask us must not make us ask others."""
    raise HTTPException(403, "URLs are not fetched here; upload the file itself")


def a_function(*arguments: Any) -> Any:
    """Gradio's own, which breaks if there is no function of the number that was sent."""
    try:
        return _GET_FUNCTION(*arguments)
    except KeyError:
        raise HTTPException(404, "this page has no such function") from None


def as_sent(_component: Any, payload: Any) -> Any:
    """In place of what components do with a picture: they would decode it, whatever its size.

    `opened` does that later, if its header allows. What remains: an upload of at most `max_body`
    bytes lies on the disk meanwhile, and its decoding in the browser is the browser's business.
    """
    return payload


def by_address(_component: Any, addresses: Sequence[str] | None) -> GalleryData:
    """In place of what galleries do with a picture: they would copy it, and keep the copy."""
    pictures = [ImageData(url=url, orig_name=url.rpartition("/")[2]) for url in addresses or ()]
    return GalleryData(root=[GalleryImage(image=picture) for picture in pictures])


def gone() -> None:
    """Stands where Gradio does something that this page does not."""
    raise HTTPException(404)


@asynccontextmanager
async def emptied(folder: Path, _app: FastAPI) -> AsyncIterator[None]:
    """Nothing that was uploaded outlives the server, even if it was killed the last time."""
    shutil.rmtree(folder, ignore_errors=True)
    yield
    shutil.rmtree(folder, ignore_errors=True)


def build(settings: Settings, service: Callable[[], Service]) -> gr.Blocks:
    """The page's parts, and what happens when they are used."""
    models = settings.models()
    usual = next(iter(models.values()))
    lasting = (UPLOADS_LAST // 6, UPLOADS_LAST)
    with gr.Blocks(title="latentgen", analytics_enabled=False, delete_cache=lasting) as page:
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
                    gr.Markdown(
                        "It is redrawn as a whole, or only where you paint, at its own size (less "
                        "the few pixels by which that is no multiple of 8)."
                    )
                    editor = gr.ImageEditor(
                        type="filepath",
                        format="png",
                        label="Picture",
                        sources=["upload", "clipboard"],
                        transforms=("crop",),
                        brush=gr.Brush(colors=["#ff00aa"], default_size=24, color_mode="fixed"),
                        layers=False,
                        elem_id="editor",
                    )
                    mask = gr.Image(
                        type="filepath",
                        sources=["upload", "clipboard"],
                        label="A mask instead of painting: white is redrawn",
                        elem_id="mask",
                    )
                    strength = gr.Slider(0, 1, 0.8, step=0.05, label="How much to change")
                    mask_blur = gr.Number(
                        0, label="Soft edge of the mask, in pixels", precision=0, minimum=0
                    )
                    mask_crop = gr.Number(
                        None,
                        label="Draw only the part around the mask, with a margin in pixels",
                        placeholder="the whole picture is drawn",
                        precision=0,
                        minimum=0,
                        elem_id="mask-crop",
                    )
                with gr.Accordion("Draw along a picture (ControlNet)", open=False):
                    net = gr.Dropdown(
                        [("none", ""), *controlnet.names_there()], value="", label="ControlNet"
                    )
                    control_image = gr.Image(
                        type="filepath",
                        sources=["upload", "clipboard"],
                        label="What it sees: edges, a pose, depths",
                        elem_id="control-image",
                    )
                    control_scale = gr.Slider(0, 2, 1, step=0.05, label="How strongly")
                    control_start = gr.Slider(
                        0, 1, 0, step=0.05, label="From this share of the steps"
                    )
                    control_end = gr.Slider(0, 1, 1, step=0.05, label="Up to this share")
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
                    guidance = gr.Slider(1, 30, usual.guidance_scale, step=0.5, label="Guidance")
                    with gr.Row():
                        width = gr.Number(usual.width, label="Width", precision=0, min_width=100)
                        height = gr.Number(usual.height, label="Height", precision=0, min_width=100)
                    loras = gr.Dropdown(
                        list(lorafolder.names_there()), label="LoRAs", multiselect=True
                    )
                    lora_weight = gr.Slider(-1, 2, 1, step=0.05, label="LoRA weight")
                    with gr.Row():
                        eta = gr.Number(
                            0, label="Eta, of DDIM", minimum=0, maximum=1, step=0.1, min_width=100
                        )
                        rescale = gr.Number(
                            0,
                            label="Guidance rescale",
                            minimum=0,
                            maximum=1,
                            step=0.1,
                            min_width=100,
                        )
                    format = gr.Radio(["png", "jpeg", "webp"], value="png", label="Format")
            with gr.Column(scale=6, min_width=320):
                told = gr.Markdown(elem_id="told")
                results = gr.Gallery(
                    label="Pictures",
                    columns=2,
                    object_fit="contain",
                    elem_id="results",
                    buttons=["download", "fullscreen"],
                )
        with gr.Tab("Gallery", id="gallery") as gallery_tab, gr.Row():
            with gr.Column(scale=6, min_width=320):
                gallery = gr.Gallery(
                    label="All pictures, the newest first",
                    columns=5,
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
            mask_blur,
            mask_crop,
            net,
            control_scale,
            control_start,
            control_end,
            eta,
            rescale,
            format,
        ]
        page.process_api = plainly(page.process_api, settings)

        async def start(
            painted: Any, mask: Any, seen: Any, *values: Any
        ) -> AsyncIterator[dict[Any, Any]]:
            """Draw what the form says, and show how it goes."""
            job = await service().submit(read_form, values, painted, mask, seen, settings)
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
            if state.status == "done" and state.result is not None:
                return {results: [address(name) for name in state.result["files"]]}
            progress = service.live.running.get(state.id)
            if progress is not None and progress.previews:
                png = base64.b64encode(progress.previews[-1]).decode()
                return {results: [f"data:image/png;base64,{png}"]}
            return {}

        async def stop(id: str | None) -> None:
            if id is not None:
                await service().live.cancel(id)

        def pictures(limit: int) -> tuple[list[str], list[str]]:
            names = service().gallery(limit)
            return [address(name) for name in names], names

        def choose(names: list[str], event: gr.SelectData) -> tuple[Any, ...]:
            name = names[event.index]
            able = gr.update(interactive=True)
            return name, describe(settings.outputs / name, settings), able, able

        def fill(file: Path) -> list[Any]:
            """The form, with the settings of a picture."""
            values, lost = settings_of(file, settings)
            if lost:
                text = html.escape("; ".join(lost), quote=False)
                gr.Warning(text, duration=None, title="The next picture may differ")
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
            [editor, mask, control_image, *form],
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
        own = [scheduler, steps, guidance, width, height]
        model.input(lambda name: defaults_of(name, settings), model, own)
        page.load(lambda: names_there(settings), None, [model, loras, net])
        gallery.select(choose, listed, [chosen, facts, use, delete])
        use.click(lambda name: fill(settings.outputs / name), chosen, form)
        delete.click(remove, [chosen, limit], [gallery, listed, chosen, facts, use, delete])
        dropped.change(
            lambda file: (
                describe(path_of(file), settings) if file else "",
                gr.update(interactive=bool(file)),
            ),
            dropped,
            [dropped_facts, use_dropped],
        )
        use_dropped.click(lambda file: fill(path_of(file)), dropped, form)
    return page


def names_there(settings: Settings) -> list[Any]:
    """What may be chosen of models, LoRAs and ControlNets: somebody may have put more there."""
    nets = [("none", ""), *controlnet.names_there()]
    choices = [list(settings.models()), list(lorafolder.names_there()), nets]
    return [gr.update(choices=names) for names in choices]


def defaults_of(name: str, settings: Settings) -> tuple[Any, ...]:
    """What the form says when a model was chosen: its own scheduler, steps, guidance and size."""
    found = settings.models().get(name)
    if found is None:
        raise InvalidRequest("model", name, "it is not here any more")
    return "", found.num_inference_steps, found.guidance_scale, found.width, found.height


def address(name: str) -> str:
    """Where the server itself gives a finished picture out, as long as there is one."""
    return f"/images/{name}"


def plainly(
    work: Callable[..., Coroutine[Any, Any, Any]], settings: Settings
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """The same work; what goes wrong in it is shown as a sentence, never as a trace."""

    @functools.wraps(work)
    async def told(*arguments: Any, **options: Any) -> Any:
        try:
            return await work(*arguments, **options)
        except Exception as error:
            text = html.escape(sentence(error, settings), quote=False)  # it is shown as HTML
            raise gr.Error(text, print_exception=False) from None

    return told


def sentence(error: Exception, settings: Settings) -> str:
    """What people are told of an error. One that nobody expected goes into the log instead."""
    match error:
        case InvalidRequest():
            return settings.told(str(error))
        case QueueFull():
            return "Too many jobs wait; try again soon"
        case HTTPException():
            return error.detail
        case InvalidPathError():
            return "Only files that were uploaded to this page are opened"
        case gr.Error():  # Gradio's own, of numbers beyond their limits and the like
            return str(error.message)
        case ValueError():  # Gradio's, and it quotes what was sent; the log must not
            log.warning("the page got what is not understood: %s", without_values(error))
            return "This was not understood; load the page again"
    log.error("the page failed", exc_info=error)
    return "Something went wrong here; the log tells what"


def read_form(
    values: Sequence[Any], painted: Any, sent_mask: Any, seen: Any, settings: Settings
) -> Sketch:
    """What the form asks for.

    Args:
        values: of the fields.
        painted, sent_mask: the files of the editor, and that of a mask which goes before it.
        seen: the file of what the ControlNet sees.
    """
    form = dict(zip(FIELDS, values, strict=True))
    image, mask = read_editor(painted, settings)
    if sent_mask is not None:
        mask = opened(path_of(sent_mask), "mask_image", settings)
        if image is None:
            raise InvalidRequest("mask_image", "a mask", "goes with a picture; load one, too")
    seed = str(form["seed"] or "").strip()
    if seed and not seed.isdecimal():
        raise InvalidRequest("seed", seed, "a whole number, or nothing for a random one")
    weight = form.pop("lora_weight")
    form["loras"] = [LoraChoice(name=name, weight=weight) for name in form["loras"] or []]
    form["seed"] = int(seed) if seed else None
    form["negative_prompt"] = form["negative_prompt"] or None
    form["scheduler"] = form["scheduler"] or None
    form["controlnet"] = form["controlnet"] or None
    if form["controlnet"] is None:  # what belongs to one asks for nothing
        form |= dict.fromkeys(OF_CONTROL)
    if image is None:
        form["strength"] = None
    if mask is None:
        form["mask_blur"] = form["padding_mask_crop"] = None
    if image is not None:  # the picture says its size, or the model that of the part
        form["width"] = form["height"] = None
        model = settings.models().get(form["model"])
        if form["padding_mask_crop"] is None and model is not None:
            form |= size_of(image, model)
    given = {name: value for name, value in form.items() if value is not None}
    drawing = checked(Drawing, {"prompt": "", "previews": PREVIEWS, **given})
    pictures = {"image": image, "mask_image": mask}
    if seen is not None and drawing.controlnet is not None:
        pictures["control_image"] = opened(path_of(seen), "control_image", settings)
    return drawing, {name: picture for name, picture in pictures.items() if picture is not None}


def read_editor(painted: Any, settings: Settings) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture in the editor, and a mask, white where it was painted on."""
    if painted is None or painted.background is None:
        return None, None
    picture = opened(path_of(painted.background), "image", settings)
    mask = Image.new("L", picture.size, 0)
    for file in filter(None, painted.layers):
        layer = opened(path_of(file), "mask_image", settings)
        alpha = layer.convert("RGBA").getchannel("A").resize(picture.size)
        mask.paste(255, mask=alpha.point(lambda value: 255 if value > 0 else 0))
    return picture, mask if mask.getbbox() is not None else None


def path_of(sent: Any) -> Path:
    """Where an upload is."""
    if not sent.path:
        raise InvalidRequest("picture", sent.url, "upload the file itself")
    return Path(sent.path)


def opened(file: Path, field: str, settings: Settings) -> Image.Image:
    """A picture; one that is too large is refused by its header.

    Raises:
        InvalidRequest: it is gone, too large, or no picture.
    """
    try:
        data = file.read_bytes()
    except OSError:
        raise InvalidRequest(field, file.name, "it is not here any more; load it again") from None
    return open_picture(data, field, settings)


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


def known_of(file: Path, settings: Settings) -> metadata.Picture:
    """A picture with what it tells of itself; see `opened`."""
    opened(file, "picture", settings)
    return metadata.read(file)


def describe(file: Path, settings: Settings) -> str:
    """What a picture tells of itself."""
    try:
        text = known_of(file, settings).infotext
    except InvalidRequest as error:
        return str(error.hint)
    return text if text is not None else "It tells no settings."


def settings_of(file: Path, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """The fields of the form that a picture tells, and what it tells that they cannot hold.

    Our own record is exact; the infotext is all that pictures of others have.

    Raises:
        InvalidRequest: it tells none.
    """
    picture = known_of(file, settings)
    if picture.record is not None:
        index, model = picture.record["index"], picture.record["model"]
        request, lost = request_of_record(picture.record)
    else:
        found = metadata.parse_infotext(picture.infotext or "")
        if not found.fields:
            raise InvalidRequest("picture", file.name, "it tells no settings")
        told = found.fields
        index, model = 0, {"name": told.get("Model"), "hash": told.get("Model hash")}
        request, lost = request_of_infotext(found)
    values = fields_of(request, index)
    name = str(model.get("name") or "")
    here = settings.models().get(name)
    if here is not None:
        values["model"] = name
    if here is None or model.get("hash") not in (None, here.hash()):
        lost.append(f"the model {name}, which is not here" if name else "the model, not told")
    if request.image is not None:
        lost.append("the picture that it was made from: load it to start from it")
    return values, lost


def request_of_record(known: dict[str, Any]) -> tuple[Request, list[str]]:
    """The request of a record of ours with the LoRAs that are here, and what of it is not."""
    net = known["request"].get("controlnet")
    if not is_here(net):
        known = metadata.without_control(known)
    request = metadata.request_from_record(known, **stand_ins(*known["pictures"]))
    told = {lora["name"]: lora["sha256"] for lora in known["request"].get("loras", ())}
    there = lorafolder.names_there()
    here = lorafolder.resolve([use for use in request.loras if use.name in there], {})
    names = {use.name for use in here if use.sha256 == told[use.name]}
    lost = [f"the LoRA {name}, which is not here" for name in told if name not in names]
    if request.control_image is not None:
        lost.append("the picture that its ControlNet saw: load it")
    elif net is not None and request.controlnet is None:
        lost.append("the ControlNet that it was made with, which is not here")
    return replace(request, loras=here), lost


def is_here(told: Any) -> bool:
    """Whether there is the ControlNet that a record names, with the same weights."""
    there = controlnet.names_there()
    if not isinstance(told, dict) or str(told.get("name")) not in there:
        return False
    try:
        return controlnet.find(told["name"]).hash() == told.get("hash")
    except InvalidRequest:  # it is damaged
        return False


def request_of_infotext(found: metadata.Infotext) -> tuple[Request, list[str]]:
    """The request of a picture of the WebUI, and what of it is not."""
    edited = "Denoising strength" in found.fields
    masked = edited and bool({"Mask blur", "Inpaint area"} & found.fields.keys())
    kinds = [*["image"] * edited, *["mask_image"] * masked]
    return metadata.request_from_infotext(found, **stand_ins(*kinds))


def stand_ins(*kinds: str) -> dict[str, Any]:
    """In place of the pictures that one was made from: without any, a request has no strength."""
    return {kind: Image.new("RGB", (1, 1), "white") for kind in kinds}


def fields_of(request: Request, index: int) -> dict[str, Any]:
    """The fields of the form for picture `index` of a request."""
    if not 0 <= index < len(request.prompt) * request.num_images:
        raise InvalidRequest("picture", index, "its record is damaged")
    k = index // request.num_images
    told = {name: getattr(request, name) for name in SAME}
    told |= {
        "prompt": " ".join([request.prompt[k], *map(tag_of, request.loras)]),
        "negative_prompt": request.negative_prompt[k] if request.negative_prompt else "",
        "scheduler": request.scheduler or "",
        "controlnet": request.controlnet.name if request.controlnet is not None else "",
        "loras": [],
        "seed": str(request.seed + index) if request.seed is not None else None,
    }
    known = {name: value for name, value in told.items() if value is not None}
    return known | {"padding_mask_crop": request.padding_mask_crop}  # None: the whole picture


def tag_of(use: LoraUse) -> str:
    """A LoRA as prompts name it, its weights to the last digit."""
    weights = dict.fromkeys((use.text_encoder_weight, use.weight))
    return ":".join(["<lora", use.name, *(repr(w).removesuffix(".0") for w in weights)]) + ">"
