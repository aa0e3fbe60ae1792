"""What does the diff's page show beside the crosscoder: plain differences, weights, predictions, answers?"""

from __future__ import annotations

import math
from typing import Any

from diffing.answer_diff import AnswerDiff
from diffing.baselines import Baselines, NormGroup
from diffing.diff_result import DiffResult
from diffing.difference_lens import DifferenceLens
from diffing.direction_writers import DirectionChange
from diffing.evidence import LatentEvidence
from diffing.excerpt import Excerpt
from diffing.logit_mining import LogitMining, MinedToken
from diffing.splice import Recovery, SpliceResult
from diffing.stagewise import StagewiseDiff
from diffing.steer import Steering
from diffing.token_topics import TopicContext
from diffing.weight_diff import GroupChange, ModuleChange, WeightChange
from tracker.report.charts import Dot, bar, interval, scatter
from tracker.report.heat import passage
from tracker.report.labels import LABEL_TONES, LABEL_WORDS

_COMPONENTS, _EXCERPTS, _TOKENS = 6, 2, 12
_READINGS, _ANSWERS, _CLUSTERS = 6, 6, 8
_KINDS, _MODULES, _DIRECTIONS, _EVIDENCE = 12, 12, 24, 24
_TURNED = 12
_RECOVERY_WORDS = {"exclusive": "the exclusive latents", "random": "as many random latents", "all": "all latents"}


def section_views(result: DiffResult) -> dict[str, Any]:
    """The views by name, None for what was not measured."""
    return {
        "baselines": result.baselines and baselines_view(result.baselines),
        "difference_sae": result.difference_sae,
        "weights": result.weights and weights_view(result.weights),
        "splice": result.splice and splice_view(result.splice),
        "mining": result.mining and mining_view(result.mining),
        "lens": result.lens and lens_view(result.lens),
        "answers": result.answers and answers_view(result.answers),
        "steering": result.steering and steering_view(result.steering),
        "stagewise": result.stagewise and stagewise_view(result.stagewise),
        "latent_map": result.map and map_view(result),
        "evidence": [_evidence(one) for one in result.evidence[:_EVIDENCE]],
    }


def stagewise_view(found: StagewiseDiff) -> dict[str, Any]:
    """The latents that turned most surely, and what the stages came to."""
    shown = found.latents[:_TURNED]
    largest = max((one.data_first.rotation for one in shown), default=0.0)
    return {
        "all": found,
        "latents": [{"latent": one, "bar": bar(one.data_first.rotation, largest, tone="tuned")} for one in shown],
        "left_out": len(found.latents) - len(shown),
    }


def baselines_view(found: Baselines) -> dict[str, Any]:
    """Principal components with what they promote, and the tokens that moved most."""
    largest = max((component.high for component in found.components if math.isfinite(component.high)), default=0.0)
    return {
        "all": found,
        "components": [
            {
                "component": component,
                "drawn": interval(component.share, component.low, component.high, largest=largest * 1.05),
                "highest": [_excerpt(one, component.highest) for one in component.highest[:_EXCERPTS]],
            }
            for component in found.components[:_COMPONENTS]
        ],
        "tokens": _norms(found.by_token[:_TOKENS]),
    }


def weights_view(found: WeightChange) -> dict[str, Any]:
    """The change by layer, by kind and by weight, and what writes the directions asked about."""
    asked = sorted(found.directions, key=lambda one: (one.written_q, one.written_p, one.name))
    return {
        "all": found,
        "by_layer": _groups(found.by_layer),
        "by_kind": _groups(found.by_kind[:_KINDS]),
        "modules": [_module(module, found.modules[0].share) for module in found.modules[:_MODULES]],
        "modules_left_out": max(0, found.n_changed - _MODULES),
        "directions": [_direction(one) for one in asked[:_DIRECTIONS]],
        "directions_left_out": max(0, len(asked) - _DIRECTIONS),
    }


def splice_view(found: SpliceResult) -> dict[str, Any]:
    """What each choice of latents recovers of tuned's predictions."""
    return {
        "all": found,
        "recoveries": [
            {"recovery": one, "words": _RECOVERY_WORDS.get(one.latents, one.latents), "drawn": _recovered(one)}
            for one in found.recoveries
        ],
    }


def mining_view(found: LogitMining) -> dict[str, Any]:
    """The next tokens that changed most often, and which of them come together."""
    largest = max((token.share for token in (*found.promoted, *found.suppressed)), default=0.0)
    return {
        "all": found,
        "promoted": [_mined(token, largest, "tuned") for token in found.promoted[:_TOKENS]],
        "suppressed": [_mined(token, largest, "base") for token in found.suppressed[:_TOKENS]],
        "topics": [
            {"topic": topic, "contexts": [_topic_context(one) for one in topic.contexts[:_EXCERPTS]]}
            for topic in found.topics
        ],
    }


def lens_view(found: DifferenceLens) -> dict[str, Any]:
    """What each mean difference says, and base steered along it."""
    return {
        "all": found,
        "readings": [
            {"reading": reading, "found": max((one.excess for one in reading.patchscope.sweep), default=0.0) > 0}
            for reading in found.readings[:_READINGS]
        ],
        "readings_left_out": max(0, len(found.readings) - _READINGS),
        "steered": found.steered[:_ANSWERS],
    }


def answers_view(found: AnswerDiff) -> dict[str, Any]:
    """How answers changed, in which ways, and the pairs that surprise base most."""
    return {
        "all": found,
        "clusters": [
            {"cluster": cluster, "pairs": [found.pairs[number] for number in cluster.examples[:2]]}
            for cluster in found.clusters
        ],
        "pairs": found.pairs[:_ANSWERS],
        "pairs_left_out": max(0, len(found.pairs) - _ANSWERS),
    }


def steering_view(found: Steering) -> dict[str, Any]:
    """The arms as headings, the answers to the first questions below them."""
    return {"all": found, "arms": [str(arm) for arm in found.arms], "answers": found.answers[:_ANSWERS]}


def map_view(result: DiffResult) -> dict[str, Any] | None:
    """The latents in the plane in the colours of their labels, and what each group of them shares."""
    found = result.map
    if found is None:
        return None
    labels = result.latents["label"]
    dots = [
        Dot(point.x, point.y, LABEL_TONES[labels[point.latent]], f"latent {point.latent}, group {point.cluster}")
        for point in found.points
    ]
    return {"all": found, "drawn": scatter(dots), "clusters": found.clusters[:_CLUSTERS]}


def _evidence(one: LatentEvidence) -> dict[str, Any]:
    tokens = list(dict.fromkeys(token for overlap in one.overlaps for token in overlap.tokens))
    return {
        "evidence": one,
        "tone": LABEL_TONES[one.label],
        "word": LABEL_WORDS[one.label],
        "writers": [_short(target.module) for target in one.modules if target.side == "writes"][:2],
        "tokens": tokens[:6],
    }


def _mined(token: MinedToken, largest: float, tone: str) -> dict[str, Any]:
    return {"token": token, "bar": bar(token.share, largest, tone=tone, width=90)}


def _topic_context(one: TopicContext) -> dict[str, Any]:
    values = [0.0] * len(one.tokens)
    values[one.peak] = 1.0
    return {"passage": passage(one.tokens, values, largest=2.0, peak=one.peak), "promoted": one.promoted[:4]}


def _recovered(one: Recovery) -> Any:
    # Below zero means led away; the drawing starts at zero and the figure beside it tells the sign.
    return interval(
        max(0.0, one.recovered), max(0.0, one.low), max(0.0, one.high), largest=1.0,
        tone="tuned" if one.latents == "exclusive" else "quiet",
    )  # fmt: skip


def _norms(groups: tuple[NormGroup, ...]) -> list[dict[str, Any]]:
    largest = max((group.mean for group in groups), default=0.0)
    return [{"group": group, "bar": bar(group.mean, largest, tone="tuned")} for group in groups]


def _groups(groups: tuple[GroupChange, ...]) -> list[dict[str, Any]]:
    largest = max((group.share for group in groups), default=0.0)
    return [{"group": group, "bar": bar(group.share, largest, tone="tuned")} for group in groups]


def _module(module: ModuleChange, largest: float) -> dict[str, Any]:
    return {"module": module, "name": _short(module.name), "bar": bar(module.share, largest, tone="tuned", width=90)}


def _direction(one: DirectionChange) -> dict[str, Any]:
    writers = [_short(target.module) for target in one.modules if target.side == "writes"]
    return {"direction": one, "writers": writers[:3]}


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _excerpt(one: Excerpt, among: tuple[Excerpt, ...]) -> dict[str, Any]:
    values = [0.0] * len(one.tokens)
    values[one.peak] = abs(one.value)
    largest = max(abs(other.value) for other in among)
    return {"value": one.value, "passage": passage(one.tokens, values, largest=largest, peak=one.peak)}
