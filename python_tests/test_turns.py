"""Second and later turns of a conversation: prompts after prompts, decoded tokens between them, in chunks."""

from __future__ import annotations

import pytest
import torch
from pairs import (
    Conversation,
    tokens,
)


@pytest.mark.parametrize("boundary, anchors", [(1, 1), (5, 1), (1, 0), (3, 30), (0, 0), (0, 4)])
def test_turns(pair, boundary, anchors):
    """Three turns of three conversations, with pending tokens; turns shorter than the boundary and longer."""
    talk = Conversation(pair, 3, 2, boundary, anchors)
    talk.prompt([tokens(20, 1), tokens(3, 2), tokens(64, 3)])
    talk.decode([tokens(3, 10 + i) for i in range(5)])
    talk.leave_pending(tokens(3, 20))
    talk.prompt([tokens(4, 4), tokens(70, 5), tokens(1, 6)])
    talk.prompt([tokens(2, 4), tokens(7, 5), tokens(9, 6)])  # a turn right after a turn
    talk.decode([tokens(3, 30 + i) for i in range(3)])
    talk.end()


def test_turns_with_chunks(gemma):
    for chunk, boundary in ((1, 4), (5, 4), (13, 4), (1, 0), (5, 0)):
        gemma.model.chunk_tokens = chunk
        talk = Conversation(gemma, 2, 3, boundary=boundary)
        talk.prompt([tokens(20, 1), tokens(11, 2)])
        talk.decode([tokens(2, 3)])
        talk.leave_pending(tokens(2, 4))
        talk.prompt([tokens(9, 5), tokens(31, 6)])
        talk.decode([tokens(2, 7)])
        talk.end()


def test_turns_of_other_depths(pair):
    """Each turn may have its own depth; what a turn left in the cache stays."""
    talk = Conversation(pair, 2, 2, boundary=2)
    talk.prompt([tokens(20, 1), tokens(33, 2)], depth=1)
    talk.decode([tokens(2, 3)])
    talk.prompt([tokens(15, 4), tokens(6, 5)], depth=pair.layers)
    talk.prompt([tokens(15, 6), tokens(6, 7)], depth=pair.layers - 2)
    talk.decode([tokens(2, 8)])
    talk.end()


def test_some_turn_while_others_wait(llama):
    """Prefill and decode of some conversations leave the others as they are; pending tokens differ per sequence."""
    talk = Conversation(llama, 3, 2, boundary=2)
    talk.prompt([tokens(20, 1), tokens(5, 2), tokens(64, 3)])
    talk.decode([tokens(3, 4)])
    sequences, references, ids = talk.sequences, talk.references, talk.ids
    sequences[0].token_ids.append(17)
    ids[0].append(17)
    talk.sequences, talk.references, talk.ids = sequences[:2], references[:2], ids[:2]
    talk.prompt([tokens(8, 5), tokens(9, 6)])
    talk.sequences, talk.references, talk.ids = sequences[1:], references[1:], ids[1:]
    talk.decode([tokens(2, 7), tokens(2, 8)])
    talk.sequences, talk.references, talk.ids = sequences, references, ids
    talk.decode([tokens(3, 9)])
    talk.end()


def test_generate_goes_on(llama):
    """A second `generate` on kept conversations: the last sampled token is run first, then the new prompt."""
    prompts, more = [tokens(20, 1), tokens(40, 2)], [tokens(7, 3), tokens(12, 4)]
    first = llama.model.generate(prompts, prefill_depth=2, max_new_tokens=9, do_sample=False, keep=True)
    second = llama.model.generate(
        more, sequences=first.sequences, prefill_depth=2, max_new_tokens=8, do_sample=False, keep=True
    )
    for i in range(2):
        reference = llama.reference(2)
        reference.logits(prompts[i], first.tokens[i])
        reference.decode(first.tokens[i][-1:])
        expected = reference.logits(more[i], second.tokens[i])
        best = expected.topk(2).values
        agree = expected.argmax(-1) == torch.tensor(second.tokens[i])
        assert (agree | (best[:, 0] - best[:, 1] < 1e-3)).all()
        ids = prompts[i] + first.tokens[i] + more[i] + second.tokens[i]
        assert list(second.sequences[i].token_ids) == ids
        llama.model.free(second.sequences[i])
