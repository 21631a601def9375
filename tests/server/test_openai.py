"""OpenAI's own Python client, unchanged, against the server."""

import base64
import io
import json
from types import SimpleNamespace

import httpx
import openai
import pytest
from PIL import Image
from starlette.datastructures import FormData

from latentgen import LatentDiffusion
from latentgen.server import webui
from latentgen.server.drawing import LAST_SEED, Drawing, LoraChoice
from latentgen.server.openai import Edit, Generation, Variation, _drawing, _fields


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def opened(item) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_models_are_listed(client):
    assert "tiny" in [model.id for model in client.models.list().data]
    assert client.models.retrieve("tiny").owned_by == "latentgen"
    with pytest.raises(openai.NotFoundError, match="there is no model 'some/other'"):
        client.models.retrieve("some/other")


def test_generations_are_what_the_library_draws(client, tiny):
    ours = {"seed": 3, "steps": 4, "guidance_scale": 2.0, "scheduler": "dpm++_2m"}
    ours |= {"negative_prompt": "red"}
    answer = client.images.generate(
        prompt="a cat", n=2, size="40x32", response_format="b64_json", extra_body=ours
    )
    own = LatentDiffusion.from_pretrained(tiny, device="cpu").generate(
        "a cat", "red", seed=3, num_inference_steps=4, guidance_scale=2, scheduler="dpm++_2m",
        num_images=2, width=40, height=32,
    )  # fmt: skip
    assert [opened(item).tobytes() for item in answer.data] == [i.tobytes() for i in own.images]
    assert (answer.size, answer.output_format, answer.quality) == ("40x32", "png", "auto")


def test_a_url_leads_to_the_picture(client):
    answer = client.images.generate(prompt="a cat", quality="low", output_format="jpeg")
    fetched = httpx.get(answer.data[0].url)
    assert fetched.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(fetched.content)).format == "JPEG"
    assert b"Steps: 25," in fetched.content.replace(b"\0", b"")  # half of the model's 50


@pytest.mark.parametrize("form", ["png", "webp"])
def test_a_stream_brings_previews_and_then_the_picture(client, form):
    events = list(
        client.images.generate(
            prompt="a cat", stream=True, partial_images=3, output_format=form,
            extra_body={"steps": 9},
        )
    )  # fmt: skip
    kinds = ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert {opened(event).format for event in events} == {form.upper()}
    assert events[-1].usage.total_tokens == 0


def test_a_picture_of_any_size_is_edited(client, picture, mask):
    """Its sides are those that the model can draw: the next smaller ones."""
    options = {"prompt": "a dog", "response_format": "b64_json"}
    odd, clear = picture.resize((35, 45)), mask.resize((35, 45)).convert("RGBA")
    clear.putalpha(mask.resize((35, 45)).point(lambda value: 255 - value))
    for fields in ({}, {"mask": png(clear)}, {"size": "auto"}):
        answer = client.images.edit(image=png(odd), **fields, **options)
        assert opened(answer.data[0]).size == (32, 40)
        assert answer.size == "32x40"
    assert opened(client.images.edit(image=png(odd), size="32x32", **options).data[0]).size == (
        32,
        32,
    )
    varied = client.images.create_variation(
        image=png(odd), response_format="b64_json", extra_body={"prompt": "a dog"}
    )
    assert opened(varied.data[0]).size == (32, 40)


def test_edits_repaint_what_is_transparent(client, picture, mask):
    clear = picture.convert("RGBA")
    clear.putalpha(mask.point(lambda value: 255 - value))
    options = {"prompt": "a dog", "response_format": "b64_json", "extra_body": {"seed": "5"}}
    by_mask = client.images.edit(image=png(picture), mask=png(clear), **options).data[0]
    by_alpha = client.images.edit(image=[png(clear)], **options).data[0]
    black = Image.new("RGB", picture.size)
    kept = mask.point(lambda value: 255 - value)
    for item in (by_mask, by_alpha):
        assert Image.composite(opened(item), black, kept).tobytes() == (
            Image.composite(picture, black, kept).tobytes()
        )
        assert opened(item).tobytes() != picture.tobytes()
    whole = client.images.edit(image=png(picture), **options).data[0]
    assert opened(whole).size == picture.size
    events = client.images.edit(image=png(picture), prompt="a dog", stream=True)
    assert [event.type for event in events] == ["image_edit.completed"]


def test_variations_take_the_prompt_that_the_picture_tells(client, picture):
    drawn = client.images.generate(prompt="a cat", response_format="b64_json")
    data = base64.b64decode(drawn.data[0].b64_json)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        again = client.images.create_variation(image=data, n=2, response_format="b64_json")
    told = Image.open(io.BytesIO(base64.b64decode(again.data[1].b64_json))).info["parameters"]
    assert told.startswith("a cat\n")
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(openai.BadRequestError, match="does not tell its prompt"),
    ):
        client.images.create_variation(image=png(picture))


WRONG = [
    ({"model": "dall-e-3"}, 404, "model"),
    ({"size": "33x32"}, 400, "size"),
    ({"size": "big"}, 400, "size"),
    ({"n": 11}, 400, "n"),
    ({"style": "vivid"}, 400, "style"),
    ({"background": "transparent"}, 400, "background"),
    ({"quality": "ultra"}, 400, "quality"),
    ({"output_compression": 50}, 400, "output_compression"),
    ({"output_format": "jpeg", "prompt": "猫" * 12_500}, 400, "output_format"),
    ({"extra_body": {"seed": 2**63 - 1}}, 400, "seed"),
    ({"partial_images": 2}, 400, "partial_images"),
    ({"prompt": " "}, 400, "prompt"),
    ({"extra_body": {"steps": 10_000}}, 400, "steps"),
    ({"extra_body": {"colour": 1}}, 400, "colour"),
    ({"extra_body": {"strength": 0.5}}, 400, "strength"),
    ({"extra_body": {"loras": [{"name": "x", "path": "/y"}]}}, 400, "loras.0.path"),
]


@pytest.mark.parametrize(("fields", "status", "named"), WRONG)
def test_what_is_wrong_is_named(client, fields, status, named):
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(**({"prompt": "a cat"} | fields))
    assert (caught.value.status_code, caught.value.param) == (status, named)
    assert named.rpartition(".")[2] in caught.value.body["message"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mask": b"no picture"}, "mask"),
        ({"input_fidelity": "high"}, "input_fidelity"),
        ({"image": [b"", b""]}, "image"),
    ],
)
def test_so_it_is_in_a_form(client, picture, fields, named):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**({"image": png(picture), "prompt": "a"} | fields))
    assert caught.value.param.startswith(named)


def test_a_form_takes_loras_as_the_client_sends_them(client, picture):
    for loras in ([{"name": "nobody", "weight": 0.5}], '[{"name": "nobody", "weight": 0.5}]'):
        with pytest.raises(openai.BadRequestError, match="loras='nobody': no LoRA of that name"):
            client.images.edit(image=png(picture), prompt="a", extra_body={"loras": loras})


def test_the_fields_of_a_form_are_gathered():
    sent = [("prompt", "a"), ("loras[][name]", "x"), ("loras[][weight]", ".5")]
    form = FormData([*sent, ("loras[][name]", "y")])
    assert _fields(form, Edit).loras == [LoraChoice(name="x", weight=0.5), LoraChoice(name="y")]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quality": "ultra"}, "quality"),
        ({"seed": ["1", "2"]}, "seed"),
        ({"loras[][name]": "x", "loras": "[]"}, "loras"),
        ({"loras[][name]": "x", "loras[][weight]": ["1", "2"]}, "loras[][weight]"),
        ({"loras[][weight]": "1"}, "loras.0.name"),
    ],
)
def test_a_form_names_the_field_that_is_wrong(server, picture, fields, named):
    files = {"image": ("a.png", png(picture))}
    answer = server.http.post("/v1/images/edits", files=files, data={"prompt": "a", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)


def test_a_comment_is_no_prompt(server, picture):
    stream = io.BytesIO()
    picture.convert("P").save(stream, "GIF", comment=b"Created with GIMP")
    files = {"image": ("a.gif", stream.getvalue())}
    answer = server.http.post("/v1/images/variations", files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(("quality", "own", "steps"), [("low", 1, 1), ("hd", 100, 150)])
def test_quality_stays_within_the_limits(quality, own, steps):
    model = SimpleNamespace(num_inference_steps=own)
    settings = SimpleNamespace(models=lambda: {"one": model}, max_steps=150)
    asked = Generation(prompt="a", quality=quality)
    assert _drawing(asked, SimpleNamespace(settings=settings)).num_inference_steps == steps


def test_who_hangs_up_is_not_drawn_for(client, server):
    impatient = client.with_options(timeout=1.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.images.generate(prompt="a cat", size="256x256", n=8, extra_body={"steps": 900})
    id = server.http.get("/jobs?limit=1").json()["jobs"][0]["id"]
    assert server.ended(id)["status"] == "cancelled"


def test_the_openapi_document_tells_every_field(server):
    told = server.http.get("/openapi.json").json()
    kinds = told["components"]["schemas"]
    for kind in (Drawing, Generation, webui.TextToImage, webui.ImageToImage):
        schema = kinds[kind.__name__]
        assert schema["additionalProperties"] is False
        assert schema["properties"].keys() >= kind.model_fields.keys()
    assert kinds["Drawing"]["properties"].keys() >= {"steps", "sampler", "n"}
    assert kinds["Drawing"]["properties"]["seed"]["anyOf"][0]["maximum"] == LAST_SEED
    assert kinds["TextToImage"]["properties"].keys() >= {*webui.NEUTRAL, *webui.MOOT}
    for path, kind, files in (
        ("edits", Edit, {"image", "image[]", "mask"}),
        ("variations", Variation, {"image", "image[]"}),
    ):
        content = told["paths"][f"/v1/images/{path}"]["post"]["requestBody"]["content"]
        schema = content["multipart/form-data"]["schema"]
        told_there = schema["properties"].keys()
        assert told_there >= (kind.model_fields.keys() - {"moderation"}) | files
        assert "image" in schema["required"]
        assert "null" not in json.dumps(schema)  # which a form cannot say


def test_the_openapi_document_tells_every_answer(server):
    told = server.http.get("/openapi.json").json()
    for path, methods in told["paths"].items():
        for method, facts in methods.items():
            if facts["tags"] == ["operation"]:
                continue
            good = next(answer for code, answer in facts["responses"].items() if code[0] == "2")
            assert good["content"], (method, path)
            for kind, content in good["content"].items():
                bare = ({}, {"type": "object"}, {"type": "object", "additionalProperties": True})
                schema = {k: v for k, v in content.get("schema", {}).items() if k != "title"}
                assert kind != "application/json" or schema not in bare, (method, path)
                if kind == "text/event-stream":  # a stream is told by its events, not as a text
                    assert "schema" not in content, (method, path)
                    assert {"event", "data"} <= content["itemSchema"]["properties"].keys()
    pictures = told["paths"]["/images/{day}/{name}"]["get"]["responses"]["200"]["content"]
    assert set(pictures) == {"image/png", "image/jpeg", "image/webp", "image/avif"}
