"""Decoding: cached = full recomputation, beam 1 = greedy, wide beam = brute force."""

import itertools

import pytest
import torch

from modules.generation.beam import beam_search
from modules.generation.greedy import greedy_search
from modules.generation.sampling import sample


def plain_greedy(model, tokens, max_words):
    """The whole prefix anew for every word, as the published code does."""
    ids = torch.full((len(tokens), 1), model.vocab_size - 2)
    for _ in range(max_words):
        logits = model.caption_logits(tokens, ids, torch.ones_like(ids))
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    words = ids[:, 1:]
    eot = model.vocab_size - 1
    ended = ((words == eot).cumsum(dim=1) - (words == eot).long()) > 0
    return words.masked_fill(ended, 0)


def test_cached_greedy_equals_full_recomputation(tiny_captioner):
    torch.manual_seed(5)
    with torch.no_grad():
        tiny_captioner.decoder.predictions.bias[49] = (
            3.0  # so that rows end, and at different places
        )
        tokens = torch.randn(12, 10, 64)
        expected = plain_greedy(tiny_captioner, tokens, 10)
    ours = greedy_search(tiny_captioner, tokens, 10)
    assert torch.equal(ours, expected[:, : ours.shape[1]])
    assert not expected[:, ours.shape[1] :].any()
    lengths = (ours != 0).sum(dim=1)
    assert (ours == 49).any(), "no row ended: nothing would be dropped"
    assert len(lengths.unique()) > 1, "all rows ended together"


def test_step_logits_equal_teacher_forcing(tiny_captioner):
    with torch.no_grad():
        tokens = tiny_captioner.encode_pairs(torch.randn(3, 2, 3, 64, 64)).tokens
        ids = torch.randint(1, 48, (3, 7))
        full = tiny_captioner.caption_logits(tokens, ids, torch.ones_like(ids))
        state = tiny_captioner.start_captions(tokens, 7)
        steps = [tiny_captioner.next_word_logits(ids[:, n : n + 1], state) for n in range(7)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-4)


def test_captions_of_one_pair_share_its_memory_and_follow_each_other(tiny_captioner):
    """Three captions of each pair, reordered after four words and one pair dropped, against teacher forcing."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(3, 10, 64, generator=generator)
    ids = torch.randint(1, 48, (3, 3, 7), generator=generator)
    beams, kept = torch.tensor([[2, 2, 0], [0, 1, 2], [1, 0, 0]]), torch.tensor([0, 2])
    with torch.no_grad():
        state = tiny_captioner.start_captions(tokens, 7, per_pair=3)
        assert state.memory[0][0].shape[0] == 3, "the memory is held once for each pair"
        for n in range(4):
            tiny_captioner.next_word_logits(ids[..., n], state)
        state, followed = (
            state.reorder(beams).select(kept),
            ids.gather(1, beams[..., None].expand(3, 3, 7)),
        )
        ids = torch.cat([followed[..., :4], ids[..., 4:]], dim=2)[kept]
        steps = torch.stack(
            [tiny_captioner.next_word_logits(ids[..., n], state) for n in range(4, 7)], dim=2
        )
        full = tiny_captioner.caption_logits(
            tokens[kept].repeat_interleave(3, 0), ids.flatten(0, 1), torch.ones(6, 7)
        )
    torch.testing.assert_close(steps.flatten(0, 1), full[:, 4:], atol=1e-4, rtol=1e-4)


class Markov:
    """A toy whose next-word probabilities depend on the pair and the last word. Of five words SOT is 3, EOT 4."""

    def __init__(self, vocab_size=5):
        self.vocab_size = vocab_size
        self.sot = vocab_size - 2
        self.eot = vocab_size - 1

    class State:
        def __init__(self, tables):
            self.tables = tables

        def select(self, pairs):
            return Markov.State(self.tables[pairs])

        def reorder(self, beams):
            return self

    def start_captions(self, pair_tokens, max_words, per_pair):
        return Markov.State(pair_tokens)

    def next_word_logits(self, ids, state):
        return state.tables[torch.arange(len(ids))[:, None], ids]


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("max_words", [1, 3, 4])
def test_wide_beam_is_brute_force(penalty, max_words):
    tables = torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(max_words)) * 2
    ours = beam_search(Markov(), tables, max_words, beam_size=5**max_words, length_penalty=penalty)
    for table, row in zip(tables.log_softmax(dim=-1), ours.tolist(), strict=True):
        best, best_score = None, -float("inf")
        for length in range(1, max_words + 1):
            for words in itertools.product(range(5), repeat=length):
                if 4 in words[:-1] or (length < max_words and words[-1] != 4):
                    continue  # goes on after EOT, or stops before the end without one
                score = (
                    sum(table[a, b].item() for a, b in zip((3, *words), words, strict=False))
                    / length**penalty
                )
                if score > best_score:
                    best, best_score = words, score
        assert tuple(row[: len(best)]) == best
        assert not any(row[len(best) :])


def test_beam_of_one_is_greedy(tiny_captioner):
    tokens = torch.randn(8, 10, 64)
    with torch.no_grad():
        tiny_captioner.decoder.predictions.bias[
            49
        ] = -20.0  # no early end: with one, a beam may prefer what greedy cannot see
    greedy = greedy_search(tiny_captioner, tokens, 8)
    assert torch.equal(beam_search(tiny_captioner, tokens, 8, beam_size=1), greedy)


def plain_beams(model, tokens, max_words, beam_size, penalty):
    """One pair, whole prefixes anew for every word, lists of (log-probability, words) sorted: (1, S, E) → the best words."""
    sot, eot = model.vocab_size - 2, model.vocab_size - 1
    beams, best = [(0.0, [])], (-float("inf"), [])
    for length in range(1, max_words + 1):
        ids = torch.tensor([[sot, *words] for _, words in beams])
        logits = model.caption_logits(tokens.expand(len(ids), -1, -1), ids, torch.ones_like(ids))[
            :, -1
        ]
        longer = [
            (score + more, [*words, word])
            for (score, words), row in zip(beams, logits.log_softmax(-1).tolist(), strict=True)
            for word, more in enumerate(row)
        ]
        ends = [
            (score / length**penalty, words)
            for score, words in longer
            if words[-1] == eot or length == max_words
        ]
        best = max([best, *ends], key=lambda beam: beam[0])
        beams = sorted((beam for beam in longer if beam[1][-1] != eot), key=lambda beam: -beam[0])[
            :beam_size
        ]
    return best[1]


@pytest.mark.parametrize(("beam_size", "penalty"), [(2, 0.0), (5, 0.0), (5, 0.4)])
def test_cached_beams_equal_full_recomputation(tiny_captioner, beam_size, penalty):
    torch.manual_seed(6)
    tokens = torch.randn(6, 10, 64)
    with torch.no_grad():
        tiny_captioner.decoder.predictions.bias[49] = (
            2.0  # so that captions end, and pairs leave the batch one by one
        )
        expected = [plain_beams(tiny_captioner, one[None], 9, beam_size, penalty) for one in tokens]
    ours = [
        [word for word in row if word]
        for row in beam_search(tiny_captioner, tokens, 9, beam_size, penalty).tolist()
    ]
    assert ours == expected
    assert len({len(words) for words in expected}) > 1, "all captions are equally long"


def test_batched_beams_equal_single_ones(tiny_captioner):
    tokens = torch.randn(5, 10, 64)
    together = beam_search(tiny_captioner, tokens, 8, beam_size=3, length_penalty=1.0)
    for row, one in zip(together, tokens, strict=True):
        single = beam_search(tiny_captioner, one[None], 8, beam_size=3, length_penalty=1.0)[0]
        assert torch.equal(row[: len(single)], single)
        assert not row[len(single) :].any()


def test_more_words_than_positions_is_refused(tiny_captioner):
    with pytest.raises(ValueError, match="77 positions"):
        greedy_search(tiny_captioner, torch.randn(1, 10, 64), 78)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_drawn_words_are_where_the_running_sum_passes_their_number(top_p):
    """A vocabulary of several blocks, most of its words impossible, pairs that end early and late, against a plain loop."""
    draw = torch.Generator().manual_seed(1)
    size, sot, eot = 700, 698, 699
    tables = torch.randn(4, size, size, generator=draw) * 3
    tables[torch.rand(tables.shape, generator=draw) < 0.9] = -1e4
    tables[..., eot] = torch.tensor([8.0, 6.0, 5.0, -1e4])[:, None]
    numbers = torch.rand(4, 3, 12, generator=draw)
    found = sample(Markov(size), tables, numbers, top_p=top_p)
    lengths = set()
    for pair, table in enumerate(tables.double().softmax(dim=-1)):
        for which in range(3):
            words = [sot]
            for number in numbers[pair, which].tolist():
                probs, order = (
                    table[words[-1]].sort(descending=True)
                    if top_p < 1
                    else (table[words[-1]], torch.arange(size))
                )
                probs = probs * (probs.cumsum(0) - probs < top_p)
                words.append(int(order[(probs.cumsum(0) <= number * probs.sum()).sum()]))
                if words[-1] == eot:
                    break
            lengths.add(len(words) - 1)
            assert [word for word in found[pair, which].tolist() if word] == [
                word for word in words[1:] if word
            ]
            assert not found[pair, which, len(words) - 1 :].any()
    assert min(lengths) < 4
    assert max(lengths) == 12
