"""Prompts as people write them: chats with tools and parts, arrays, tokenizers' output, images by address."""

import base64
import json

import numpy as np
import pytest
import torch
import transformers
from helpers import make_chat_folder
from PIL import Image

import pop_ext
from pop_ext.analysis.samples import load_samples
from pop_ext.runtime.prompts import encode_prompt, prompt_list
from pop_ext.vision.images import open_image

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
LISTS = (
    "{% for message in messages %}{{ message.role }}:{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def loaded(tiny_llama, tmp_path_factory):
    return pop_ext.load(make_chat_folder(tiny_llama, tmp_path_factory), dtype=torch.float32)


@pytest.fixture
def model(loaded):
    before = loaded.tokenizer.chat_template
    yield loaded
    loaded.tokenizer.chat_template = before


def text(model, messages) -> str:
    return model.tokenizer.decode(encode_prompt(model, messages, "prompts[0]", [])[0])


@pytest.mark.parametrize("call", [{"tool_calls": [CALL]}, {"tool_calls": [CALL], "content": None}])
def test_tool_calls(model, call):
    chat = [{"role": "user", "content": "Rain?"}, {"role": "assistant"} | call,
            {"role": "tool", "content": "no"}, {"role": "user", "content": "Sun?"}]  # fmt: skip
    plain = [message | {"content": message.get("content") or ""} for message in chat]
    assert text(model, chat) == text(model, plain)
    assert "None" not in text(model, chat)


def test_parts_of_text(model):
    chat = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    assert text(model, chat) == text(model, [{"role": "user", "content": "one\ntwo"}])
    model.tokenizer.chat_template = LISTS
    assert text(model, chat) == "user:[one][two]"


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "Hi", "chat template refuses it: roles must alternate"),
        ("{{ messages[0].x.y }}", "Hi", "chat template refuses it: .*has no attribute 'x'"),
        ("{% if %}", "Hi", "chat template refuses it: "),
        (None, [{"type": "text"}], "the chat template shows text only, and a message has"),
        (None, [{"type": "audio", "audio": "x"}], "a part of a message is .*, expected text, image or video"),
        (None, [{"type": "image", "url": "x.png"}], "has images, but this model .llama. reads text only"),
        (None, [{"type": "image_url", "image_url": {"url": "x.png"}}], "has images, but this model"),
    ],
)
def test_refused(model, template, chat, message):
    if template is not None:
        model.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        model.generate([{"role": "user", "content": chat}], max_new_tokens=1)


def test_half_of_a_surrogate_pair(model):
    for prompt in ("a\ud800b", [{"role": "user", "content": "\udfff"}]):
        with pytest.raises(ValueError, match=r"prompts\[0\] has '\\ud.*' at \d+: half of a surrogate pair"):
            model.generate(prompt, max_new_tokens=1)


def test_messages_without_anything(model):
    for message in ({"role": "user"}, {"content": "x"}):
        with pytest.raises(TypeError, match="expected a message with 'role' and 'content'"):
            text(model, [message])


def test_token_ids_of_any_kind(model):
    ids = [5, 6, 7]
    wanted = model.generate(ids, max_new_tokens=3).tokens
    for prompt in (torch.tensor(ids), np.array(ids), {"input_ids": ids}, torch.tensor([ids]), [torch.tensor(ids)],
                   [np.array(ids, np.int32)], {"input_ids": torch.tensor([ids])}, tuple(ids)):  # fmt: skip
        assert model.generate(prompt, max_new_tokens=3).tokens == wanted
    assert prompt_list(torch.tensor(ids)) == (ids_list := [ids], True) and ids_list
    assert prompt_list(torch.tensor([ids, ids])) == ([ids, ids], False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_tokenizers_output(model, side, kind):
    """Padding is no prompt."""
    texts = ["a longer text", "short"]
    tokenizer = model.tokenizer
    tokenizer.pad_token, tokenizer.padding_side = "<|end|>", side
    encoded = tokenizer(texts, padding=True, return_tensors=kind)
    assert isinstance(encoded, transformers.BatchEncoding)
    assert prompt_list(encoded) == ([tokenizer(line).input_ids for line in texts], False)
    assert prompt_list(tokenizer("one")) == ([tokenizer("one").input_ids], True)


def test_no_token_ids(model):
    for prompt in (torch.tensor([1.5, 2.0]), np.array([[0.5]]), torch.tensor(3), [torch.ones(2, 2).long()]):
        with pytest.raises((TypeError, ValueError), match="prompts"):
            model.generate(prompt, max_new_tokens=1)
    with pytest.raises(ValueError, match="prompts has pixel_values: pass the images themselves as images"):
        model.generate({"input_ids": [1], "pixel_values": torch.ones(1)}, max_new_tokens=1)


def test_images_by_address(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    path = tmp_path / "a picture.png"
    picture.save(path)
    data = base64.b64encode(path.read_bytes()).decode()
    for image in (str(path), path.as_uri(), f"data:image/png;base64,{data}", path.read_bytes()):
        assert (np.asarray(open_image(image, "image")) == np.asarray(picture)).all()
    for image, message in (
        ("https://example.org/a.png", "image: https://example.org/a.png is a web address: download it"),
        ("data:image/png,abc", "expected data:image/...;base64"),
        ("data:image/png;base64,a!b", "image: data:image/png;base64,a!b: "),
        (f"data:image/png;base64,{base64.b64encode(b'text').decode()}", "not an image of a known format"),
    ):
        with pytest.raises(ValueError, match=message):
            open_image(image, "image")


def test_samples_with_a_byte_order_mark(model, tmp_path):
    line = json.dumps({"images": [], "prompt": "A\u2028question", "continuation": " an answer"}, ensure_ascii=False)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\r\n".encode())
    pairs = load_samples(path, model)
    assert len(pairs) == 2 and pairs.prompts[0] == pairs.prompts[1] == model.tokenizer("A\u2028question").input_ids
    assert pairs.continuations[0] == model.tokenizer(" an answer").input_ids
    path.write_bytes(line.encode() + b"\n{\xff")
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2, is not UTF-8 text"):
        load_samples(path, model)
