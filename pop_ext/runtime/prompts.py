"""Prompts: text, chats and token ids, with their images and videos, become token ids."""

import operator
import re
from collections.abc import Mapping
from typing import Any, cast

from ..checkpoints.files import one_line
from .checks import is_integer, type_name


def encode_prompt(model, prompt, name: str, history: list[int], images=(), videos=()) -> tuple[list[int], list]:
    """The token ids of one prompt, which is text, chat messages or token ids, and its images and videos, ready for the
    vision tower (`vision.Media`). `history` is the conversation so far, if any.
    """
    if not isinstance(prompt, (str, list, tuple)):
        raise TypeError(
            f"{name} is of type {type_name(prompt)}, expected a string, a list of chat messages or a list of token ids"
        )
    is_text, is_chat = isinstance(prompt, str), bool(prompt) and isinstance(prompt[0], dict)
    if is_chat:
        prompt, images, videos = _chat_media(prompt, name, images, videos)
    if (images or videos) and model.vision is None:
        kind = "images" if images else "videos"
        raise ValueError(f"{name} has {kind}, but this model ({model.spec.model_type}) reads text only")
    if (is_text or is_chat) and model.tokenizer is None:
        raise ValueError(f"{name} is text, but the model has no tokenizer: pass token ids")
    media: dict[str, list] = {"image": [], "video": []}
    if images or videos:
        media = {
            "image": [model.vision.process_image(image, f"{name}, image {i}") for i, image in enumerate(images)],
            "video": [model.vision.process_video(video, f"{name}, video {i}") for i, video in enumerate(videos)],
        }
    if is_text or is_chat:
        text: Any = render_chat(model.tokenizer, prompt, name, continues=bool(history)) if is_chat else prompt
        if model.vision is not None:
            kinds = {kind: model.vision.placeholder(kind, model.tokenizer) for kind in model.vision.kinds}
            if is_text and not any(token in text for token in kinds.values()):
                text = (
                    "".join(model.vision.written(kind, model.tokenizer) for kind in kinds for _ in media[kind]) + text
                )
            text = model.vision.expand(text, media, name, model.tokenizer)
        if (wrong := re.search("[\ud800-\udfff]", text)) is not None:
            raise ValueError(f"{name} has {wrong[0]!a} at {wrong.start()}: half of a surrogate pair, which is no text")
        token_ids = model.tokenizer(text, add_special_tokens=is_text and not history).input_ids
        # A finished answer ends with the token that a chat template puts after it: once is enough.
        if is_chat and history and history[-1:] == token_ids[:1]:
            token_ids = token_ids[1:]
    else:
        token_ids = []
        for i, token in enumerate(prompt):
            if not is_integer(token):
                raise TypeError(f"{name}[{i}] is of type {type_name(token)}, expected a token id (int)")
            token_ids.append(operator.index(cast(Any, token)))
    if not token_ids:
        raise ValueError(f"{name} is empty: a prompt has at least one token")
    vocab_size = model.spec.vocab_size
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        wrong = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        raise ValueError(
            f"{name} has token id {token_ids[wrong]} at position {wrong}, outside of the vocabulary [0, {vocab_size})"
        )
    pictures = {kind: [item for item, _ in entries] for kind, entries in media.items()}
    if model.vision is not None:
        model.vision.locate(token_ids, pictures["image"], pictures["video"], name)
    return token_ids, pictures["image"] + pictures["video"]


def _chat_media(messages, name: str, images, videos) -> tuple[list, list, list]:
    """Chat messages with a placeholder part for each image and video, and these in order.

    A part may bring its own; the others take the next of `images` and `videos`. Where no message has parts for any,
    they go before the text of the first message of the user.
    """
    given, found = {"image": list(images), "video": list(videos)}, {"image": [], "video": []}
    result, waiting = [], {kind: list(items) for kind, items in given.items()}
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list | tuple):
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "image_url":  # as OpenAI's interface spells it
                    kind, source = "image", part.get("image_url")
                    part = {"type": kind, kind: source.get("url") if isinstance(source, dict) else source}
                if kind not in ("text", "image", "video"):
                    raise ValueError(f"{name}: a part of a message is {part!r:.80}, expected text, image or video")
                if kind != "text":
                    source = next((key for key in (kind, "path", "url") if key in part), None)
                    if source is not None:
                        found[kind].append(part[source])
                    elif waiting[kind]:
                        found[kind].append(waiting[kind].pop(0))
                    else:
                        raise ValueError(f"{name} has more parts of type {kind} than {kind}s: expected one for each")
                    part = {"type": kind}
                parts.append(part)
            message = message | {"content": parts}
        result.append(message)
    if not any(found.values()):
        for i, message in enumerate(result):
            if any(waiting.values()) and isinstance(message, dict) and message.get("role") == "user":
                content = message.get("content")
                text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
                parts = [{"type": kind} for kind, items in waiting.items() for _ in items]
                result[i], found, waiting = message | {"content": parts + text}, waiting, {}
    for kind, items in waiting.items():
        if items:
            raise ValueError(
                f"{name} has {len(found[kind])} parts of type {kind}, but {len(items)} more {kind}s are given"
            )
    return result, found["image"], found["video"]


def render_chat(tokenizer, messages, name: str, *, continues: bool = False, answered: bool = False) -> str:
    """Chat messages as text, up to where the assistant's answer starts; `answered`: the last message is that answer."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
            raise TypeError(f"{name}[{i}] is {message!r:.100}, expected a message with 'role' and 'content'")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{name} is a list of chat messages, but the tokenizer has no chat template: pass text")

    messages = [_for_template(message, str(tokenizer.chat_template)) for message in messages]

    def render(messages):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
        except Exception as error:  # a template is a program, and fails as any
            raise ValueError(f"{name}: the tokenizer's chat template refuses it: {one_line(error)}") from error

    if not continues:
        return render(messages)
    # A template renders whole chats, with a system message and the like at their start. So let the new messages follow
    # a chat whose answer is known, and take what the template puts behind that answer.
    answer = "\N{SYMBOL FOR START OF TEXT}answer\N{SYMBOL FOR END OF TEXT}"
    chat = render([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}, *messages])
    if chat.count(answer) != 1:
        raise ValueError(f"{name}: the tokenizer's chat template cannot continue a chat: pass text or token ids")
    return chat.partition(answer)[2]


def _for_template(message: dict, template: str) -> dict:
    """A message whose content the template can show: no list, and not nothing, where it would print what Python does.

    Several texts are joined by newlines.
    """
    content = message.get("content")
    if content is None:
        return message | {"content": ""}
    lists = re.search(r"\bin\s+(\w+(\.content|\[['\"]content['\"]\])|content)\b", template)
    if isinstance(content, list | tuple) and not lists:
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the chat template shows text only, and a message has {content!r:.80}")
        return message | {"content": "\n".join(texts)}
    return message


def prompt_list(prompts) -> tuple[list, bool]:
    """The prompts, and whether it was a single one. Tensors and arrays of token ids become lists; of a tokenizer's
    output its input_ids, without what attention_mask marks as padding.
    """
    if isinstance(prompts, str):
        return [prompts], True
    mask = None
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        if others := prompts.keys() & {"pixel_values", "image_grid_thw", "pixel_values_videos"}:
            raise ValueError(f"prompts has {', '.join(sorted(others))}: pass the images themselves as images")
        prompts, mask = prompts["input_ids"], prompts.get("attention_mask")
    mask: Any = _plain_lists(mask)
    prompts = _plain_lists(prompts)
    if mask:
        single = bool(prompts) and is_integer(prompts[0])
        rows = zip([prompts], [mask], strict=True) if single else zip(prompts, mask, strict=True)
        rows = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
        prompts = rows[0] if single else rows
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(
            f"prompts is of type {type_name(prompts)}, expected a string, a list of chat messages, a list of "
            "token ids, or a list of these"
        )
    if not prompts:
        raise ValueError("prompts is empty: expected at least one prompt")
    single = isinstance(prompts[0], dict) or is_integer(prompts[0])
    return ([prompts] if single else list(prompts)), single


def _plain_lists(value):
    """Tensors and arrays as lists, also those in a list."""
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain_lists(item) if hasattr(item, "ndim") else item for item in value]
    return value


def media_lists(name: str, media, prompts, single: bool) -> list[list]:
    """For each prompt the list of its images or videos."""
    if media is None:
        return [[] for _ in prompts]
    if not isinstance(media, (list, tuple)):
        raise TypeError(f"{name} is of type {type_name(media)}, expected a list")
    if single:
        return [list(media)]
    if len(media) != len(prompts) or not all(entry is None or isinstance(entry, list | tuple) for entry in media):
        raise ValueError(f"{name} is {media!r:.80}, expected a list (or None) for each of the {len(prompts)} prompts")
    return [list(entry or []) for entry in media]
