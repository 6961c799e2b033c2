"""Prompts: text, chats and token ids, with their images and videos, become token ids."""

import operator

from .checks import is_integer, type_name


def encode_prompt(model, prompt, name: str, history: list[int], images=(), videos=()) -> tuple[list[int], list]:
    """The token ids of one prompt, which is text, chat messages or token ids, and its images and videos, ready for the
    vision tower (`vision.Media`). `history` is the conversation so far, if any.
    """
    if not isinstance(prompt, (str, list, tuple)):
        raise TypeError(
            f"{name} must be a string, a list of chat messages or a list of token ids, got {type_name(prompt)}"
        )
    is_text, is_chat = isinstance(prompt, str), bool(prompt) and isinstance(prompt[0], dict)
    if is_chat:
        prompt, images, videos = _chat_media(prompt, name, images, videos)
    if (images or videos) and model.vision is None:
        kind = "images" if images else "videos"
        raise ValueError(f"{name} has {kind}, but this model ({model.spec.model_type}) reads text only")
    if (is_text or is_chat) and model.tokenizer is None:
        raise ValueError(f"{name} is text, but the model has no tokenizer: pass token ids")
    media = {"image": [], "video": []}
    if images or videos:
        media = {
            "image": [model.vision.process_image(image, f"{name}, image {i}") for i, image in enumerate(images)],
            "video": [model.vision.process_video(video, f"{name}, video {i}") for i, video in enumerate(videos)],
        }
    if is_text or is_chat:
        text = _render_chat(model.tokenizer, prompt, name, continues=bool(history)) if is_chat else prompt
        if model.vision is not None:
            kinds = {kind: model.vision.placeholder(kind, model.tokenizer) for kind in model.vision.kinds}
            if is_text and not any(token in text for token in kinds.values()):
                text = (
                    "".join(model.vision.written(kind, model.tokenizer) for kind in kinds for _ in media[kind]) + text
                )
            text = model.vision.expand(text, media, name, model.tokenizer)
        token_ids = model.tokenizer(text, add_special_tokens=is_text and not history).input_ids
        # A finished answer ends with the token that a chat template puts after it: once is enough.
        if is_chat and history and history[-1:] == token_ids[:1]:
            token_ids = token_ids[1:]
    else:
        token_ids = []
        for i, token in enumerate(prompt):
            if not is_integer(token):
                raise TypeError(f"{name}[{i}] must be a token id (int), got {type_name(token)}")
            token_ids.append(operator.index(token))
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
                if kind not in ("text", "image", "video"):
                    raise ValueError(f"{name}: a part of a message is {part!r:.80}, expected text, image or video")
                if kind != "text":
                    if kind in part:
                        found[kind].append(part[kind])
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
                text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
                parts = [{"type": kind} for kind, items in waiting.items() for _ in items]
                result[i], found, waiting = message | {"content": parts + text}, waiting, {}
    for kind, items in waiting.items():
        if items:
            raise ValueError(
                f"{name} has {len(found[kind])} parts of type {kind}, but {len(items)} more {kind}s are given"
            )
    return result, found["image"], found["video"]


def _render_chat(tokenizer, messages, name: str, continues: bool) -> str:
    """Chat messages as text, up to where the assistant's answer starts."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise TypeError(f"{name}[{i}] must be a message with 'role' and 'content', got {message!r:.100}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{name} is a list of chat messages, but the tokenizer has no chat template: pass text")

    def render(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    if not continues:
        return render(messages)
    # A template renders whole chats, with a system message and the like at their start. So let the new messages follow
    # a chat whose answer is known, and take what the template puts behind that answer.
    answer = "\N{SYMBOL FOR START OF TEXT}answer\N{SYMBOL FOR END OF TEXT}"
    chat = render([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}, *messages])
    if chat.count(answer) != 1:
        raise ValueError(f"{name}: the tokenizer's chat template cannot continue a chat: pass text or token ids")
    return chat.partition(answer)[2]


def prompt_list(prompts) -> tuple[list, bool]:
    """The prompts, and whether it was a single one."""
    if isinstance(prompts, str):
        return [prompts], True
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(
            "prompts must be a string, a list of chat messages, a list of token ids, or a list of these, got "
            + type_name(prompts)
        )
    if not prompts:
        raise ValueError("prompts is empty: expected at least one prompt")
    single = isinstance(prompts[0], dict) or is_integer(prompts[0])
    return ([prompts] if single else list(prompts)), single


def media_lists(name: str, media, prompts, single: bool) -> list[list]:
    """For each prompt the list of its images or videos."""
    if media is None:
        return [[] for _ in prompts]
    if not isinstance(media, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {type_name(media)}")
    if single:
        return [list(media)]
    if len(media) != len(prompts) or not all(entry is None or isinstance(entry, list | tuple) for entry in media):
        raise ValueError(f"{name} is {media!r:.80}, expected a list (or None) for each of the {len(prompts)} prompts")
    return [list(entry or []) for entry in media]
