"""The command line: thin. It turns flags into a `Request`, shows progress, and writes files.

Nothing here imports torch, PIL or numpy at the top: help and errors in the arguments are answered
at once. Exit status: 0 done, 1 the drawing failed, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__, startup
from .errors import InvalidRequest, LatentgenError
from .home import home
from .modelfolder import DEFAULT_MODEL, Model
from .outputs import check_file, check_folder, in_name, write_file

if TYPE_CHECKING:
    from rich.console import Console

    from .pipeline import LatentDiffusion, Result
    from .request import Request

app = typer.Typer(
    name="latentgen",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"latentgen {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Say which one this is.", callback=_version)
    ] = False,
) -> None:
    """Pictures from text with latent diffusion; offline, with a small model of its own inside."""


# The flags, once; the commands below choose from them.
Prompt = Annotated[str, typer.Argument(help="What to draw.", show_default=False)]
PromptFile = Annotated[
    Path,
    typer.Argument(help="A prompt set: YAML, or .txt with a prompt a line.", show_default=False),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Where to write; the ending decides: .png, .jpg, .webp.",
        show_default="PROMPT-SEED.png",
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A folder, a .safetensors checkpoint, a name of `latentgen models`, or a hub id.",
        show_default="the bundled model",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="For a checkpoint: a model folder of its kind, for what such files lack.",
        show_default="the usual one, from the hub",
    ),
]
Negative = Annotated[str | None, typer.Option(help="What to keep away from.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="How strongly to follow the prompt; 1 = off.")]
Scheduler = Annotated[str | None, typer.Option(help="See `latentgen schedulers`.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same picture.")]
SetSeed = Annotated[
    int | None, typer.Option("--seed", help="Of the first picture.", show_default="the set's, or 0")
]
Count = Annotated[int, typer.Option("--num-images", "-n", help="How many pictures.")]
Height = Annotated[int | None, typer.Option(help="In pixels.")]
Width = Annotated[int | None, typer.Option(help="In pixels.")]
Eta = Annotated[float, typer.Option(help="DDIM's randomness, 0 to 1.")]
Rescale = Annotated[float, typer.Option(help="Against overexposure, 0 to 1.")]
Grid = Annotated[bool, typer.Option("--grid", help="Also write all pictures on one sheet.")]
Gif = Annotated[Path | None, typer.Option(help="Also write the denoising as an animation.")]
Quality = Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Attention = Annotated[str | None, typer.Option(help="sdpa, xformers or sliced.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="FILE, FILE:WEIGHT or FILE:TEXT_ENCODER:UNET; several add up.",
        metavar="FILE[:WEIGHT]",
        show_default=False,
    ),
]
Embeddings = Annotated[
    list[Path] | None,
    typer.Option("--embedding", help="A textual inversion; several.", show_default=False),
]
ControlNet = Annotated[
    str | None,
    typer.Option(
        "--controlnet",
        help="A folder, a file, a name or a hub id.",
        show_default="none",
        metavar="NAME",
    ),
]
ControlImage = Annotated[
    Path | None, typer.Option(help="What the ControlNet sees.", show_default=False)
]
ControlScale = Annotated[float, typer.Option(help="How strongly to follow it, 0 to 10.")]
ControlStart = Annotated[float, typer.Option(help="From which share of the steps, 0 to 1.")]
ControlEnd = Annotated[float, typer.Option(help="Up to which share of the steps, 0 to 1.")]
Strength = Annotated[float | None, typer.Option(help="How much to change, 0 to 1.")]
Picture = Annotated[Path, typer.Argument(help="The picture to start from.", show_default=False)]
Mask = Annotated[
    Path, typer.Argument(help="As large as the picture; white = repaint.", show_default=False)
]
MaskBlur = Annotated[int, typer.Option(help="Soft edge inside the mask, in pixels.")]
MaskCrop = Annotated[
    int | None,
    typer.Option(
        help="Draw only the part around the mask, with this margin in pixels.",
        show_default="the whole picture",
    ),
]


def _drawing_flags(
    output: Output = None,
    negative_prompt: Negative = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    scheduler: Scheduler = None,
    seed: Seed = None,
    num_images: Count = 1,
    height: Height = None,
    width: Width = None,
    eta: Eta = 0.0,
    guidance_rescale: Rescale = 0.0,
    lora: Loras = None,
    embedding: Embeddings = None,
    controlnet: ControlNet = None,
    control_image: ControlImage = None,
    controlnet_conditioning_scale: ControlScale = 1.0,
    control_guidance_start: ControlStart = 0.0,
    control_guidance_end: ControlEnd = 1.0,
    model: ModelName = DEFAULT_MODEL,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
    grid: Grid = False,
    gif: Gif = None,
    quality: Quality = 95,
) -> None:
    """The flags that all drawing commands share; Typer reads them from this signature."""


def _drawing(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the shared flags in place of its `**flags`."""

    @wraps(command)
    def run(**flags: Any) -> None:
        command(**flags)

    own = [
        p for p in signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD
    ]
    shared = signature(_drawing_flags, eval_str=True).parameters.values()
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *shared)]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@app.command()
@_drawing
def generate(prompt: Prompt, **flags: Any) -> None:
    """Draw a picture from text."""
    _draw(prompt=prompt, **flags)


@app.command()
@_drawing
def img2img(prompt: Prompt, image: Picture, strength: Strength = None, **flags: Any) -> None:
    """Redraw a picture as the prompt says."""
    _draw(prompt=prompt, image=image, strength=strength, **flags)


@app.command()
@_drawing
def inpaint(
    prompt: Prompt,
    image: Picture,
    mask_image: Mask,
    strength: Strength = None,
    mask_blur: MaskBlur = 0,
    padding_mask_crop: MaskCrop = None,
    **flags: Any,
) -> None:
    """Repaint the white part of a mask; every other pixel stays as it is."""
    flags |= {"strength": strength, "mask_blur": mask_blur}
    flags |= {"mask_image": mask_image, "padding_mask_crop": padding_mask_crop}
    _draw(prompt=prompt, image=image, **flags)


@app.command()
def replay(
    picture: Annotated[Path, typer.Argument(help="A picture with metadata.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the copy.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Instead of its own.")] = None,
    config: Config = None,
    image: Annotated[Path | None, typer.Option(help="The picture it was made from.")] = None,
    mask_image: Annotated[Path | None, typer.Option(help="The mask it was made with.")] = None,
    lora: Annotated[
        list[Path] | None, typer.Option(help="A LoRA it was made with.", show_default=False)
    ] = None,
    embedding: Embeddings = None,
    controlnet: Annotated[
        str | None, typer.Option(help="The ControlNet it was made with.", show_default=False)
    ] = None,
    control_image: Annotated[
        Path | None, typer.Option(help="What the ControlNet saw.", show_default=False)
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
) -> None:
    """Make a picture again from its own metadata; status 1 if the copy is not the same."""
    with _reporting():
        from . import metadata
        from .lorafolder import parse, resolve

        if output is not None:
            _check_output(output)
        found = metadata.read(picture)
        known = found.record
        notes: list[str] = []
        pictures = {"image": image, "mask_image": mask_image, "control_image": control_image}
        if known is not None:
            for name in known["pictures"]:
                if pictures[name] is None:
                    hint = f"it was made from another picture; name it: --{_dashed(name)} FILE"
                    raise InvalidRequest("picture", str(picture), hint)
            request = metadata.request_from_record(known, lora or (), controlnet, **pictures)
            _check_loras_are_here(request)
            model = model or _recorded_model(known["model"])
            dtype = dtype or known["settings"].get("dtype")
            attention = attention or known["settings"].get("attention")
        elif (info := metadata.parse_infotext(found.infotext or "")).fields:
            given = pictures | {"controlnet": controlnet}
            request, notes = metadata.request_from_infotext(info, lora or (), **given)
        else:
            hint = "it carries no settings; pictures of latentgen and of the WebUI do"
            raise InvalidRequest("picture", str(picture), hint)
        for use in resolve([parse([file]) for file in lora or ()], {}):
            if use.path not in [own.path for own in request.loras]:
                hint = "the picture was not made with it; leave it out"
                raise InvalidRequest("lora", str(use.path), hint)

        where = (model or DEFAULT_MODEL, device, dtype, attention)
        result = _finish(request, *where, embedding, config=config)
        index, quality = (known["index"], known["quality"]) if known else (0, metadata.QUALITY)
        if not 0 <= index < len(result.images):
            raise InvalidRequest("picture", str(picture), "its record is damaged")
        if known is not None:
            notes += metadata.differences(known, result)
        elif model_told := _another_model(info.fields, result.model):
            notes.append(model_told)
        for note in notes:
            typer.echo(f"not reproduced: {note}")
        copy = metadata.encode_result(result, index, found.format, quality)
        distance = _distance(found.image, copy)
        typer.echo(f"largest pixel difference: {distance}")
        if output is not None:
            format = metadata.picture_format(output)
            write_file(output, metadata.encode_result(result, index, format, quality))
            typer.echo(str(output))
        if distance != 0:
            raise typer.Exit(1)


@app.command()
def batch(
    prompts: PromptFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.")] = Path("pictures"),
    model: ModelName = DEFAULT_MODEL,
    config: Config = None,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", "-n", help="A prompt.", show_default="the set's, or 1"),
    ] = None,
    seed: SetSeed = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    scheduler: Scheduler = None,
    lora: Loras = None,
    embedding: Embeddings = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=64, help="Pictures of alike prompts drawn at once.")
    ] = 1,
    format: Annotated[str, typer.Option(help="png, jpg, webp or avif.")] = "png",
    quality: Quality = 95,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Draw over pictures that came from elsewhere.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
) -> None:
    """Draw every prompt of a file; started again, it goes on where it was stopped."""
    there, total = 0, 0
    try:
        with _reporting("what is drawn stays; the same command goes on"):
            from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

            from . import metadata, modelfolder
            from .batch import draw, plan
            from .promptfile import read_prompts

            flags: dict[str, Any] = {"scheduler": scheduler, "guidance_scale": guidance_scale}
            flags |= {"num_inference_steps": steps, "loras": lora or None}
            flags |= {"num_images": num_images}
            settings = {name: value for name, value in flags.items() if value is not None}
            found, ending = modelfolder.find(model), f".{format.removeprefix('.')}"
            metadata.check_quality(metadata.picture_format(Path(f"picture{ending}")), quality)
            wanted = read_prompts(prompts)
            tasks = plan(wanted, found, output, ending, seed, **settings)
            console = _console()
            with console.status("loading the model"):
                requests = [task.request for task in tasks]
                pipe = _load(model, device, dtype, attention, embedding, requests, config)
                if found.is_single_file:  # such a file does not tell its size before it is loaded
                    tasks = plan(wanted, pipe.model, output, ending, seed, **settings)
                waiting = [task for task in tasks if not task.is_done(pipe, overwrite, quality)]
            total = sum(len(task.files) for task in tasks)
            there = total - sum(len(task.files) for task in waiting)
            columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
            with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
                bar = progress.add_task("drawing", completed=there, total=total)
                for files in draw(pipe, waiting, batch_size, quality):
                    there += len(files)
                    progress.update(bar, completed=there)
    finally:
        if total:
            typer.echo(f"{output}: {there} of {total} pictures")


@app.command()
def bench(
    model: ModelName = DEFAULT_MODEL,
    config: Config = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings to compare, like steps=10,dtype=bfloat16; several.",
            metavar="NAME=VALUE[,...]",
            show_default="four usual ones",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often to measure each.")] = 3,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write a .json.", show_default="none"),
    ] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    scheduler: Scheduler = None,
    num_images: Count = 1,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
) -> None:
    """Measure time and memory on this machine, with different settings side by side."""
    with _reporting():
        import json

        from rich.console import Console
        from rich.table import Table

        from . import modelfolder
        from .bench import compare as measure
        from .bench import read_settings, report

        if output is not None:
            check_file(output)
        found = modelfolder.find(model)
        asked: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
        asked |= {"scheduler": scheduler, "num_images": num_images}
        asked |= {"height": height, "width": width}
        asked |= {"device": device, "dtype": dtype, "attention": attention}
        asked["config"] = None if config is None else str(config)
        shared = {name: value for name, value in asked.items() if value is not None}
        usual = ("steps=10", "num_images=4", "guidance_scale=1", "attention=sliced")
        texts = ("", *(usual if compare is None else compare))
        rows = [read_settings(text, found, shared) for text in texts]
        console = _console()
        with console.status("measuring") as status:
            for number, row in measure(rows, model, shared, rounds):
                status.update(f"round {number + 1} of {rounds}: {row.name}")
        for row in rows:
            if row.error is not None:
                typer.echo(f"{row.name}: {row.error}", err=True)
        facts = report(rows, model, shared)
        if output is not None:
            output.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        if rows[0].error is not None:
            raise typer.Exit(1)
        table = Table("", "s/picture", "ratio", "first s", "start s", "peak MiB", box=None)
        for line in facts["rows"]:
            if line["picture"] is not None:
                figures = (line[name] for name in ("picture", "ratio", "first", "start"))
                cells = [f"{value:.2f}" for value in figures]
                table.add_row(line["name"], *cells, f"{line['memory'] / 2**20:.0f}")
        Console().print(table)
        machine = facts["machine"]
        on = f"{machine['device']}, {machine['threads']} threads"
        typer.echo(f"{found.name} on {on}; medians of {rounds} rounds")


@app.command()
def evaluate(
    prompts: PromptFile,
    model: ModelName = DEFAULT_MODEL,
    config: Config = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.")] = Path("evaluation"),
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", "-n", min=1, help="A prompt.", show_default="the set's, or 1"),
    ] = None,
    seed: SetSeed = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    scheduler: Scheduler = None,
    lora: Loras = None,
    embedding: Embeddings = None,
    clip: Annotated[
        str | None,
        typer.Option(help="A CLIP, or a model folder with one.", show_default="the model's own"),
    ] = None,
    real_dir: Annotated[Path | None, typer.Option(help="Real pictures, for KID.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Measure the pictures of this folder, in order, instead of drawing."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
) -> None:
    """Measure a model on a prompt set: CLIP score, retrieval, KID, diversity, time."""
    with _reporting(real="real_dir"):
        from rich.progress import Progress

        from . import modelfolder
        from .promptfile import read_prompts
        from .request import Request

        wanted = read_prompts(prompts)
        flags: dict[str, Any] = {"scheduler": scheduler, "guidance_scale": guidance_scale}
        flags |= {"num_inference_steps": steps, "loras": lora or None}
        settings = {name: value for name, value in flags.items() if value is not None}
        found = modelfolder.find(model)
        if num_images is not None:
            settings["num_images"] = num_images
        requests = [Request(**(entry | settings)).resolve(found) for entry in wanted.entries]
        own = found.path if found.path is not None and found.path.is_dir() else None
        judge_folder = clip if clip is not None else own
        brings_one = own is not None and (own / "image_encoder").is_dir()
        if judge_folder is None or (clip is None and not brings_one):
            hint = "it has no image_encoder to judge with: --clip openai/clip-vit-base-patch32 has"
            raise InvalidRequest("model", model, hint)
        if images is not None:
            if not images.is_dir():
                raise InvalidRequest("images", images, "no such folder")
            of_drawing: dict[str, Any] = {
                "seed": seed,
                "num_images": num_images,
                "steps": steps,
                "lora": lora,
            }
            of_drawing |= {"guidance_scale": guidance_scale, "scheduler": scheduler}
            of_drawing |= {"embedding": embedding, "device": device, "dtype": dtype}
            of_drawing |= {"attention": attention, "config": config}
            for name, value in of_drawing.items():
                if value not in (None, []):
                    hint = "pictures that are there are measured, not drawn; leave out "
                    raise InvalidRequest("images", images, f"{hint}--{_dashed(name)}")
        if real_dir is not None and not real_dir.is_dir():
            raise InvalidRequest("real_dir", real_dir, "no such folder")
        check_folder(output)
        report = output / "evaluation.json"
        drawn = report.is_file() and "images" not in modelfolder.read_json(report, "output").get(
            "settings", {}
        )
        if images is None and not drawn and any(output.glob("pictures/*.png")):
            hint = "has pictures that no evaluation drew and would lose them; another --output"
            raise InvalidRequest("output", output / "pictures", hint)
        console = _console()
        with console.status("loading"):
            from .embeddings import read_embedding
            from .evaluate import Evaluation, Judge, measure
            from .evaluate import evaluate as run_evaluation
            from .images import read_pictures

            for file in embedding or ():
                read_embedding(file)  # refused before the judge is read
            real = read_pictures(real_dir, "real_dir") if real_dir is not None else None
            judge = Judge(judge_folder)
            startup.end()
        if images is not None:
            pictures = read_pictures(images, "images")
            metrics = measure(pictures, wanted.prompts, judge, real)
            facts = {"images": str(images), "prompts": wanted.name, "clip": judge.name}
            evaluation = Evaluation(metrics, facts, pictures, wanted.prompts)
        else:
            with console.status("loading the model"):
                pipe = _load(model, device, dtype, attention, embedding, requests, config)
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("drawing", total=None)
                evaluation = run_evaluation(
                    pipe,
                    wanted,
                    judge,
                    real,
                    settings.pop("num_images", None),
                    seed,
                    lambda done, total: progress.update(task, completed=done, total=total),
                    **settings,
                )
        for name, value in evaluation.metrics.items():
            typer.echo(f"{name:20} {value:.4f}")
        written = evaluation.save(output)
        typer.echo(", ".join(map(str, written)))


@app.command()
def models() -> None:
    """List the models on this machine."""
    from rich.console import Console
    from rich.table import Table

    from . import modelfolder

    table = Table(box=None)
    table.add_column("model", overflow="fold")  # whole: it is what --model takes
    for column in ("size", "steps", "guidance", "where"):
        table.add_column(column)
    places = {
        "bundled": modelfolder.bundled_models(),
        "models in LATENTGEN_HOME": modelfolder.models_in(home() / "models"),
        "hub cache": modelfolder.cached_models(),
    }
    for where, found in places.items():
        for entry in found:
            size = "" if entry.is_single_file else f"{entry.width} x {entry.height}"
            steps, guidance = str(entry.num_inference_steps), f"{entry.guidance_scale:g}"
            table.add_row(entry.name, size, steps, guidance, where)
    wide = None if sys.stdout.isatty() else 1000  # a line each, for programs
    Console(width=wide).print(table)
    typer.echo("--model also takes any folder in the diffusers layout or .safetensors checkpoint.")


@app.command()
def schedulers() -> None:
    """List the schedulers, one line each."""
    from rich.console import Console
    from rich.table import Table

    from .schedulers import NAMES, SPACINGS, SPREADS

    table = Table("scheduler", "elsewhere", "", box=None)
    for name, entry in NAMES.items():
        table.add_row(name, entry.label, entry.about)
    Console().print(table)
    typer.echo(
        f"A name may be followed by its noise levels ({', '.join(SPREADS)}) and its spacing\n"
        f"({', '.join(SPACINGS)}, align your steps): 'dpm++_2m karras', 'euler trailing'.\n"
        "The names of other programs work too: 'DPM++ 2M Karras', 'euler_ancestral'."
    )


@app.command()
def serve(
    model: ModelName = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Others than 127.0.0.1 need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    token: Annotated[
        str | None,
        typer.Option(envvar="LATENTGEN_TOKEN", help="That clients must send.", show_default="none"),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name of this server; several.", show_default=False),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(envvar="LATENTGEN_DATABASE_URL", help="PostgreSQL.", show_default="SQLite"),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Jobs that may wait.")] = 100,
    max_batch: Annotated[int, typer.Option(min=1, max=64, help="Pictures drawn at once.")] = 8,
    max_images: Annotated[int, typer.Option(min=1, max=64, help="In one job.")] = 16,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Of a job.")] = 150,
    max_pixels: Annotated[int, typer.Option(min=64, help="Of a picture.")] = 2048 * 2048,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Let the log say what is asked for.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    attention: Attention = None,
) -> None:
    """Serve a page for people, and HTTP for other programs: OpenAI's API and the WebUI's."""
    with _reporting():
        try:
            from .server.run import serve as run
            from .server.settings import Settings
        except ImportError as error:
            hint = f"needs `pip install 'latentgen[server]'` ({error.name} is missing)"
            raise InvalidRequest("serve", "", hint) from error
        run(
            Settings(
                host=host,
                port=port,
                token=(token or "").strip() or None,  # that of a file ends in a line break
                model=model,
                device=device,
                dtype=dtype,
                attention=attention,
                database_url=database_url,
                allowed_hosts=tuple(allowed_host or ()),
                max_queue=max_queue,
                max_batch=max_batch,
                max_images=max_images,
                max_steps=max_steps,
                max_pixels=max_pixels,
                log_prompts=log_prompts,
            )
        )


lora_app = typer.Typer(help="Look into LoRA files, and convert them.", no_args_is_help=True)
app.add_typer(lora_app, name="lora")
LoraFile = Annotated[
    Path, typer.Argument(help="A .safetensors file, or a folder of PEFT's.", show_default=False)
]


@lora_app.command()
def inspect(
    file: LoraFile,
    metadata: Annotated[bool, typer.Option("--metadata", help="All of it.")] = False,
) -> None:
    """Say what a LoRA holds: layout, parts, ranks, alphas, strength, where it comes from."""
    with _reporting(loras="file"):
        from .lora import describe, read_lora

        lora = read_lora(file)
        for name, value in describe(lora).items():
            typer.echo(f"{name:15} {value}")
        for name, value in sorted(lora.metadata.items()) if metadata else ():
            typer.echo(f"{name} = {value}")


@lora_app.command()
def convert(
    file: LoraFile,
    to: Annotated[str, typer.Option(help="kohya, diffusers or peft.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A file; a folder for peft.", show_default=False),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="Round to float16 or bfloat16.", show_default="as it is"),
    ] = None,
) -> None:
    """Write a LoRA in another layout, and measure that it still does the same."""
    with _reporting(loras="file", layout="to", file="output"):
        from .lora import convert as convert_lora

        difference, largest = convert_lora(file, output, to, dtype)
        typer.echo(
            f"{output}: alpha / rank * up @ down differs by {difference:.3g} at most, "
            f"where its largest entry is {largest:.3g}"
        )


def main() -> None:
    """The console script."""
    startup.begin()
    warnings.showwarning = _show_warning
    app()


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if category is UserWarning and "latentgen" in Path(filename).parts:
        typer.echo(f"warning: {message}", err=True)


def _draw(
    *,
    output: Path | None,
    steps: int | None,
    model: str,
    config: Path | None,
    device: str | None,
    dtype: str | None,
    attention: str | None,
    lora: list[str] | None,
    embedding: list[Path] | None,
    grid: bool,
    gif: Path | None,
    quality: int,
    **options: Any,
) -> None:
    """What generate, img2img and inpaint have in common."""
    with _reporting():
        from . import metadata
        from .images import contact_sheet
        from .request import Request

        _check_output(output if output is not None else Path("picture.png"))
        if gif is not None:
            check_file(gif, "gif")
            if gif.suffix.lower() != ".gif":
                raise InvalidRequest("gif", str(gif), "the name must end in .gif")
        request = Request(num_inference_steps=steps, loras=lora or (), **options)
        format = metadata.picture_format(output if output is not None else Path("picture.png"))
        metadata.check_quality(format, quality)
        if output is not None:
            metadata.check_fits(format, request)
            for target in metadata.numbered(output, request.num_images):
                check_file(target)
            if grid:
                check_file(_sheet_name(output))
        frames: list[Any] | None = [] if gif is not None else None
        result = _finish(request, model, device, dtype, attention, embedding, frames, config)
        target = output if output is not None else _default_name(result)
        written = result.save(target, quality)
        if grid:
            sheet = _sheet_name(target)
            page = contact_sheet(result.images)
            text = metadata.infotext(result, 0)
            write_file(sheet, metadata.encode(page, format, text, None, quality))
            written.append(sheet)
        if gif is not None and frames is not None:
            _write_gif(gif, [*frames, result.image], result)
            written.append(gif)
        seeds = result.seeds
        seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        size = f"{result.request.width} x {result.request.height}"
        names = ", ".join(str(path) for path in written)
        typer.echo(f"{names}: {size}, {seed}, {result.seconds:.1f} s")


def _finish(
    request: Request,
    model: str,
    device: str | None,
    dtype: str | None,
    attention: str | None,
    embeddings: list[Path] | None = None,
    frames: list[Any] | None = None,
    config: Path | None = None,
) -> Result:
    """Check everything, load the model, draw with a progress bar; `frames` collects previews."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from . import modelfolder

    found = modelfolder.find(model)
    if not found.is_single_file:  # such a file does not tell its size before it is loaded
        request = request.resolve(found)
    console = _console()
    with console.status("loading the model"):
        pipe = _load(model, device, dtype, attention, embeddings, [request], config)
    columns = (
        TextColumn("drawing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("drawing", total=None)
        for step in pipe.draw(request):
            progress.update(task, completed=step.index + 1, total=step.total)
            if frames is not None:
                frames.append(step.preview())
    assert step.result is not None
    return step.result


def _load(
    model: str,
    device: str | None,
    dtype: str | None,
    attention: str | None,
    embeddings: list[Path] | None,
    requests: Sequence[Request],
    config: Path | None = None,
) -> LatentDiffusion:
    """The model with its textual inversions, which some request should say."""
    from .embeddings import read_embedding, said
    from .pipeline import LatentDiffusion

    for file in embeddings or ():
        read_embedding(file)  # refused before the model is read
    pipe: LatentDiffusion = LatentDiffusion.from_pretrained(
        model, device, dtype, attention, config=config
    )
    texts = [text for one in requests for text in (*one.prompt, *(one.negative_prompt or ()))]
    for file in embeddings or ():
        token = pipe.load_embedding(file)
        if not any(map(said(token).search, texts)):
            warnings.warn(f"{file} is called {token!r}, which no prompt says", stacklevel=1)
    startup.end()
    return pipe


@contextmanager
def _reporting(interrupted: str = "nothing was written", **flags: str) -> Iterator[None]:
    """Turn errors into one line and an exit status.

    Args:
        interrupted: what to say after Ctrl-C.
        flags: what a command calls a field.
    """
    try:
        yield
    except LatentgenError as error:
        text = str(error)
        if isinstance(error, InvalidRequest):
            flags = {
                "num_inference_steps": "steps",
                "loras": "lora",
                "path": "embedding",
                **flags,
            }
            flag = flags.get(error.field, error.field)
            text = text.replace(error.field, _dashed(flag), 1)
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(2 if isinstance(error, InvalidRequest) else 1) from None
    except OSError as error:  # a full disk, a folder that went away
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except RuntimeError as error:  # torch's
        reason = str(error).partition("\n")[0]
        if "out of memory" not in reason and "allocate memory" not in reason:
            raise
        advice = "smaller or fewer pictures, --dtype float16 and --attention sliced need less"
        typer.echo(f"error: {reason} ({advice})", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {interrupted}", err=True)
        raise typer.Exit(130) from None


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _check_output(path: Path) -> None:
    from .metadata import picture_format

    picture_format(path)
    check_file(path)


def _console() -> Console:
    """For what only people at a terminal want to see."""
    from rich.console import Console

    return Console(stderr=True, quiet=not sys.stderr.isatty())


def _sheet_name(path: Path) -> Path:
    return path.with_name(f"{path.stem}-grid{path.suffix}")


def _default_name(result: Result) -> Path:
    return Path(f"{in_name(result.request.prompt[0])}-{result.seeds[0]}.png")


def _write_gif(path: Path, frames: list[Any], result: Result) -> None:
    from .metadata import infotext

    durations = [120] * (len(frames) - 1) + [2000]  # milliseconds
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        comment=infotext(result, 0).encode(),
    )


def _check_loras_are_here(request: Request) -> None:
    from .lorafolder import names_there

    for use in request.loras:
        if use.path is None and use.name not in names_there():
            hint = "it was made with this LoRA, which is not here; name its file: --lora FILE"
            raise InvalidRequest("lora", use.name, hint)


def _recorded_model(known: dict[str, Any]) -> str:
    from .modelfolder import bundled_models

    for entry in bundled_models():
        if entry.name == known.get("name"):
            return str(entry.path)
    # What a picture names is not fetched unasked.
    name = known.get("hub_id") or known.get("name")
    raise InvalidRequest("model", name, "not bundled; say where it is: --model FOLDER or HUB ID")


def _another_model(told: dict[str, str], model: Model) -> str | None:
    """What there is to say if an infotext does not tell of this model, by its hash or its name."""
    for key, own in (("Model hash", model.hash()), ("Model", model.name)):
        if key in told:
            name = told.get("Model", told[key])
            return None if told[key] == own else f"its model, {name}; this is {model.name}"
    return "its model, which it does not name"


def _distance(first, copy: bytes) -> int | str:
    """The largest difference of any channel of any pixel, 0 to 255."""
    import io

    import numpy as np
    from PIL import Image

    again = Image.open(io.BytesIO(copy)).convert("RGB")
    if first.size != again.size:
        (width, height), (w, h) = first.size, again.size
        is_sheet = width % w == height % h == 0
        sheet = "; it seems to be a sheet of several pictures" if is_sheet else ""
        return f"the sizes differ, {width} x {height} and {w} x {h}{sheet}"
    return int(abs(np.asarray(first, dtype=int) - np.asarray(again, dtype=int)).max())


if __name__ == "__main__":
    main()
