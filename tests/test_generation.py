"""Decoding: cached = full recomputation, beam 1 = greedy, wide beam = brute force, sampling."""

import itertools

import pytest
import torch

from modules.generation import greedy_search
from modules.generation.beam import beam_search
from modules.generation.sampling import draw_uniforms, sample
from modules.generation.steps import OpenCaptions, shift_for_teacher_forcing
from modules.tokenizer import PAD
from system.compute import use_deterministic_algorithms


def set_end_bias(captioner, bias):
    """Make captions end early (a high bias) or never (a low one)."""
    with torch.no_grad():
        captioner.decoder.predictions.bias[captioner.eot] = bias


def plain_greedy(model, tokens, max_words):
    """Computes the whole prefix again for every word, as the published code does."""
    ids = torch.full((len(tokens), 1), model.sot)
    for _ in range(max_words):
        logits = model.caption_logits(tokens, ids, torch.ones_like(ids))
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    words = ids[:, 1:]
    is_end = (words == model.eot).long()
    ended_before = is_end.cumsum(dim=1) - is_end > 0
    return words.masked_fill(ended_before, PAD)


@torch.no_grad()
def test_cached_greedy_equals_full_recomputation(tiny_captioner):
    torch.manual_seed(5)
    set_end_bias(tiny_captioner, 3.0)
    tokens = torch.randn(12, 10, 64)
    expected = plain_greedy(tiny_captioner, tokens, 10)
    ours = greedy_search(tiny_captioner, tokens, 10)
    assert torch.equal(ours, expected[:, : ours.shape[1]])
    assert not expected[:, ours.shape[1] :].any()
    lengths = (ours != PAD).sum(dim=1)
    assert (ours == tiny_captioner.eot).any(), "no caption ended: no pair would be left out"
    assert len(lengths.unique()) > 1, "all captions ended together"


@torch.no_grad()
def test_step_logits_equal_teacher_forcing(tiny_captioner):
    tokens = tiny_captioner.encode_pairs(torch.randn(3, 2, 3, 64, 64)).tokens
    ids = torch.randint(1, 48, (3, 7))
    full = tiny_captioner.caption_logits(tokens, ids, torch.ones_like(ids))
    state = tiny_captioner.start_captions(tokens, 7)
    steps = [tiny_captioner.next_token_logits(ids[:, n : n + 1], state) for n in range(7)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_captions_of_one_pair_share_its_memory_and_can_be_reordered(tiny_captioner):
    """Three captions of each pair, reordered after four words, one pair left out."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(3, 10, 64, generator=generator)
    ids = torch.randint(1, 48, (3, 3, 7), generator=generator)
    parents = torch.tensor([[2, 2, 0], [0, 1, 2], [1, 0, 0]])
    kept = torch.tensor([0, 2])
    state = tiny_captioner.start_captions(tokens, 7, per_pair=3)
    assert state.memory[0][0].shape[0] == 3, "the memory is held once for each pair"
    for n in range(4):
        tiny_captioner.next_token_logits(ids[..., n], state)
    state = state.reorder(parents).select(kept)
    reordered = ids.gather(1, parents[..., None].expand(3, 3, 7))
    ids = torch.cat([reordered[..., :4], ids[..., 4:]], dim=2)[kept]
    steps = [tiny_captioner.next_token_logits(ids[..., n], state) for n in range(4, 7)]
    full = tiny_captioner.caption_logits(
        tokens[kept].repeat_interleave(3, 0), ids.flatten(0, 1), torch.ones(6, 7)
    )
    ours = torch.stack(steps, dim=2).flatten(0, 1)
    torch.testing.assert_close(ours, full[:, 4:], atol=1e-4, rtol=1e-4)


class Markov:
    """A toy model: the next word depends on the pair and the last word alone.

    A pair's "tokens" are its table (V, V) of logits. The last two of V words are SOT and EOT.
    """

    def __init__(self, vocab_size=5):
        self.vocab_size = vocab_size
        self.sot = vocab_size - 2
        self.eot = vocab_size - 1

    class State:
        def __init__(self, tables):
            self.tables = tables

        def select(self, pairs):
            return Markov.State(self.tables[pairs])

        def reorder(self, parents):
            return self

    def start_captions(self, pair_tokens, max_words, per_pair):
        return Markov.State(pair_tokens)

    def next_token_logits(self, ids, state):
        return state.tables[torch.arange(len(ids))[:, None], ids]


def open_ids(captions):
    """The tokens so far (O, n, length) of the open pairs."""
    return captions.ids[captions.rows, :, : captions.length]


def test_open_captions_close_when_all_of_a_pair_have_ended():
    """Two captions of each of three pairs, whose words are given here."""
    captions = OpenCaptions(Markov(), torch.zeros(3, 5, 5), max_words=3, per_pair=2)
    captions.append(torch.tensor([[4, 1], [4, 4], [0, 2]]))
    assert captions.rows.tolist() == [0, 2]
    assert open_ids(captions).tolist() == [[[4], [1]], [[0], [2]]]
    assert captions.next_logits().shape == (2, 2, 5)
    captions.append(torch.tensor([[2, 3], [4, 1]]))
    captions.reorder(torch.tensor([[0, 1], [1, 1]]))
    assert open_ids(captions).tolist() == [[[4, 0], [1, 3]], [[2, 1], [2, 1]]]
    captions.append(torch.tensor([[2, 4], [4, 4]]))
    assert not captions.is_open
    assert captions.written_ids().tolist() == [
        [[4, 0, 0], [1, 3, 4]],
        [[4, 0, 0], [4, 0, 0]],
        [[2, 1, 4], [2, 1, 4]],
    ]


def test_teacher_forcing_shifts_captions_behind_the_start():
    """A 0 before the end, or without one, is a token like others."""
    ids = torch.tensor([[5, 0, 9], [9, 0, 0], [0, 0, 0]])
    previous, mask = shift_for_teacher_forcing(ids, sot=8, eot=9)
    assert previous.tolist() == [[8, 5, 0], [8, 9, 0], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]


def all_captions(max_words):
    """All that a Markov of five words can write: to EOT (4), or to max_words without one."""
    for length in range(1, max_words + 1):
        for words in itertools.product(range(5), repeat=length):
            has_ended = words[-1] == 4
            if 4 not in words[:-1] and (has_ended or length == max_words):
                yield words


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("max_words", [1, 3, 4])
def test_wide_beam_is_brute_force(penalty, max_words):
    tables = torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(max_words)) * 2
    ours = beam_search(Markov(), tables, max_words, beam_size=5**max_words, length_penalty=penalty)
    for table, row in zip(tables.log_softmax(dim=-1), ours.tolist(), strict=True):

        def score(words, table=table):
            steps = itertools.pairwise((3, *words))
            return sum(table[step].item() for step in steps) / len(words) ** penalty

        best = max(all_captions(max_words), key=score)
        assert tuple(row[: len(best)]) == best
        assert not any(row[len(best) :])


def test_a_caption_that_ends_with_the_token_0_keeps_it():
    table = torch.full((5, 5), -50.0)
    table[:, 0] = 0.0  # token 0 follows everything
    assert beam_search(Markov(), table[None], 3, beam_size=2).tolist() == [[0, 0, 0]]


def test_beam_of_one_is_greedy(tiny_captioner):
    """Where no caption ends early: else a beam could prefer an end that greedy search passes."""
    set_end_bias(tiny_captioner, -20.0)
    tokens = torch.randn(8, 10, 64)
    greedy = greedy_search(tiny_captioner, tokens, 8)
    assert torch.equal(beam_search(tiny_captioner, tokens, 8, beam_size=1), greedy)


def plain_beams(model, tokens, max_words, beam_size, penalty):
    """Beam search of one pair (1, S, E) over lists, without a cache: (log-probability, words)."""
    beams, best = [(0.0, [])], (-float("inf"), [])
    for length in range(1, max_words + 1):
        ids = torch.tensor([[model.sot, *words] for _, words in beams])
        mask = torch.ones_like(ids)
        logits = model.caption_logits(tokens.expand(len(ids), -1, -1), ids, mask)[:, -1]
        longer = []
        for (score, words), row in zip(beams, logits.log_softmax(-1).tolist(), strict=True):
            longer += [(score + more, [*words, word]) for word, more in enumerate(row)]
        for score, words in longer:
            if words[-1] == model.eot or length == max_words:
                best = max(best, (score / length**penalty, words), key=lambda beam: beam[0])
        beams = [beam for beam in longer if beam[1][-1] != model.eot]
        beams = sorted(beams, key=lambda beam: -beam[0])[:beam_size]
    return best[1]


@pytest.mark.parametrize(("beam_size", "penalty"), [(2, 0.0), (5, 0.0), (5, 0.4)])
@torch.no_grad()
def test_cached_beams_equal_full_recomputation(tiny_captioner, beam_size, penalty):
    torch.manual_seed(6)
    set_end_bias(tiny_captioner, 2.0)
    tokens = torch.randn(6, 10, 64)
    expected = [plain_beams(tiny_captioner, one[None], 9, beam_size, penalty) for one in tokens]
    rows = beam_search(tiny_captioner, tokens, 9, beam_size, penalty).tolist()
    assert [[word for word in row if word] for row in rows] == expected
    assert len({len(words) for words in expected}) > 1, "all captions are equally long"


def test_batched_beams_equal_single_ones(tiny_captioner):
    tokens = torch.randn(5, 10, 64)
    together = beam_search(tiny_captioner, tokens, 8, beam_size=3, length_penalty=1.0)
    for row, one in zip(together, tokens, strict=True):
        single = beam_search(tiny_captioner, one[None], 8, beam_size=3, length_penalty=1.0)[0]
        assert torch.equal(row[: len(single)], single)
        assert not row[len(single) :].any()


def test_more_words_than_positions_are_refused(tiny_captioner):
    with pytest.raises(ValueError, match="77 positions"):
        greedy_search(tiny_captioner, torch.randn(1, 10, 64), 78)


def plain_sample(table, numbers, top_p, eot):
    """One caption of a Markov's table (V, V) of probabilities: words until EOT."""
    words = [len(table) - 2]
    for number in numbers:
        order = torch.arange(len(table))
        probs = table[words[-1]]
        if top_p < 1:
            probs, order = probs.sort(descending=True)
        probs = probs * (probs.cumsum(0) - probs < top_p)
        place = (probs.cumsum(0) <= number * probs.sum()).sum()
        words.append(int(order[place]))
        if words[-1] == eot:
            break
    return words[1:]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sampled_words_are_where_the_running_sum_passes_their_number(top_p):
    """Most words are impossible; captions that end early and late."""
    generator = torch.Generator().manual_seed(1)
    size, eot = 700, 699
    tables = torch.randn(4, size, size, generator=generator) * 3
    tables[torch.rand(tables.shape, generator=generator) < 0.9] = -1e4
    tables[..., eot] = torch.tensor([8.0, 6.0, 5.0, -1e4])[:, None]
    numbers = torch.rand(4, 3, 12, generator=generator)
    found = sample(Markov(size), tables, numbers, top_p=top_p)
    lengths = set()
    for pair, table in enumerate(tables.double().softmax(dim=-1)):
        for place in range(3):
            words = plain_sample(table, numbers[pair, place].tolist(), top_p, eot)
            lengths.add(len(words))
            assert found[pair, place, : len(words)].tolist() == words
            assert not found[pair, place, len(words) :].any()
    assert min(lengths) < 4
    assert max(lengths) == 12


@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_no_number_draws_a_word_of_probability_zero(top_p):
    """The first and the last words are impossible; numbers reach from 0 to the last below 1."""
    size = 5000
    logits = torch.full((1, 1, size), -torch.inf)
    logits[..., 1000:4000] = torch.rand(3000, generator=torch.Generator().manual_seed(2))
    numbers = torch.tensor([0.0, 1e-30, 0.5, 0.999999, 1 - 2**-24]).reshape(1, 5, 1)
    table = logits[0].expand(size, size)
    found = sample(Markov(size), table[None], numbers, top_p=top_p)[0, :, 0]
    assert ((found >= 1000) & (found < 4000)).all()
    if top_p == 1:
        assert found[0] == 1000
        assert found[-1] == 3999


def test_uniforms_follow_from_the_seed_and_the_pairs_number():
    numbers = draw_uniforms(3, [7, 0], num_captions=2, max_words=5)
    assert numbers.shape == (2, 2, 5)
    assert numbers.dtype == torch.float32
    assert torch.equal(draw_uniforms(3, [0], 2, 5)[0], numbers[1])
    assert not torch.equal(draw_uniforms(4, [0], 2, 5)[0], numbers[1])
    assert numbers[0, 0, :2].tolist() == pytest.approx([0.530889, 0.6822299], abs=1e-6)


def test_sampling_follows_the_probabilities():
    """4,000 captions of two words, against a table in which the next word depends on the last."""
    table = torch.full((5, 5), -50.0)
    table[3] = torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05]).log()  # after the start
    table[0] = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6]).log()
    uniforms = torch.rand(1, 4000, 2, generator=torch.Generator().manual_seed(0))
    ids = sample(Markov(), table[None], uniforms)[0]
    torch.testing.assert_close(frequencies(ids[:, 0]), table[3].exp(), atol=0.03, rtol=0)
    after_first = ids[ids[:, 0] == 0][:, 1]
    torch.testing.assert_close(frequencies(after_first), table[0].exp(), atol=0.04, rtol=0)
    assert (ids[ids[:, 0] == 4][:, 1] == PAD).all(), "words after the end"


def test_top_p_and_temperature_change_the_probabilities():
    table = torch.full((5, 5), -50.0)
    table[3] = torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05]).log()
    uniforms = torch.rand(1, 4000, 1, generator=torch.Generator().manual_seed(0))
    nucleus = sample(Markov(), table[None], uniforms, top_p=0.6)[0, :, 0]
    assert set(nucleus.tolist()) == {0, 1}, "the two most likely words reach .6"
    assert (nucleus == 0).float().mean().item() == pytest.approx(0.5 / 0.7, abs=0.03)
    hot = sample(Markov(), table[None], uniforms, temperature=2.0)[0, :, 0]
    expected = (table[3] / 2).softmax(-1)
    torch.testing.assert_close(frequencies(hot), expected, atol=0.03, rtol=0)


def test_sampling_where_cumsum_is_forbidden_as_on_gpus(monkeypatch):
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(0))
    expected = sample(Markov(), table[None], uniforms, top_p=0.9)
    cumsum = torch.Tensor.cumsum

    def forbidden(values, dim):
        assert not torch.are_deterministic_algorithms_enabled()
        return cumsum(values, dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", forbidden)
    with use_deterministic_algorithms(True):
        found = sample(Markov(), table[None], uniforms, top_p=0.9)
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.equal(found, expected)


def frequencies(ids):
    """The share of each of five words."""
    return torch.bincount(ids, minlength=5) / len(ids)
