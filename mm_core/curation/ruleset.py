"""A file of named rules: read, checked, hashed, and laid over rows.

    rules:
      small:     {rule: shorter_side, min: 200}
      long_thin: {rule: aspect_ratio, max: 3}
      no_words:  {rule: words, min: 3}
      foreign:   {rule: language, languages: [en]}

Rules are looked at in the file's order; the name of the first that a sample fails is its reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt64
from numpy.typing import NDArray

from mm_core.config import nearest, read_file, validate
from mm_core.curation import balance_rules, image_rules, score_rules, text_rules
from mm_core.curation.rows import Rows
from mm_core.curation.rule import CountingRule, Judgement, Rule
from mm_core.data.personal import PersonalKind
from mm_core.errors import ConfigError, DataError

_KINDS: tuple[type[Rule], ...] = (
    image_rules.ShorterSide,
    image_rules.AspectRatio,
    image_rules.Pixels,
    image_rules.BytesPerPixel,
    image_rules.ImageFormat,
    text_rules.Characters,
    text_rules.Words,
    text_rules.Alphanumeric,
    text_rules.RepeatedCharacters,
    text_rules.RepeatedWords,
    text_rules.FileName,
    text_rules.Boilerplate,
    text_rules.Language,
    text_rules.Personal,
    score_rules.Sharpness,
    score_rules.Information,
    balance_rules.Balance,
    balance_rules.Reweight,
    score_rules.Similarity,
    score_rules.Score,
)
RULES: dict[str, type[Rule]] = {kind.model_fields["rule"].default: kind for kind in _KINDS}
"""By the name that `rule:` has."""
MAX_RULES = 64
"""Which rules a sample fails is one bit each of 64."""


@dataclass(frozen=True)
class Verdict:
    """What a rule set makes of some rows."""

    first: Int[np.ndarray, " rows"]
    """The number of the first rule a row fails; -1 where it fails none."""
    fails: UInt64[np.ndarray, " rows"]
    """Bit i: it fails rule i."""
    judgements: list[Judgement]
    """By rule."""

    @property
    def weights(self) -> Float[np.ndarray, " rows"]:
        """How often a row is drawn in an epoch: 0 where it fails a rule, else the product of what the rules say."""
        weights = (self.first < 0).astype(np.float64)
        for judgement in self.judgements:
            weights *= 1.0 if judgement.weights is None else judgement.weights
        return weights


@dataclass(frozen=True)
class RuleSet:
    """Named rules, in order."""

    rules: Mapping[str, Rule]

    @classmethod
    def read(cls, path: Path) -> RuleSet:
        """
        Raises:
            ConfigError: no such file, not YAML, or rules that are not valid.
        """
        values = read_file(path)
        if unknown := sorted(set(values) - {"rules"}):
            raise ConfigError(f"{path}: unknown key {unknown[0]!r}; a file of rules has one key, `rules`")
        return cls.parse(values.get("rules"), where=str(path), folder=path.parent)

    @classmethod
    def parse(cls, named: Any, *, where: str, folder: Path | None = None) -> RuleSet:
        """
        Args:
            folder: that of files which rules name.

        Raises:
            ConfigError: the first rule that is not valid, with the nearest name of one that is.
        """
        if not isinstance(named, dict) or not named:
            raise ConfigError(f"{where}: `rules` is a mapping of names to rules, for example `small: {{rule: shorter_side, min: 200}}`")
        if len(named) > MAX_RULES:
            raise ConfigError(f"{where}: {len(named)} rules, above {MAX_RULES}: make several ledgers, which a run takes together")
        return cls({str(name): _parse_rule(str(name), values, where, folder) for name, values in named.items()})

    @property
    def columns(self) -> list[str]:
        """Of the index."""
        return list(dict.fromkeys(column for rule in self.rules.values() for column in rule.columns))

    @property
    def scores(self) -> dict[str, list[str]]:
        """The scores that are read, by name, with the columns of each."""
        found: dict[str, list[str]] = {}
        for rule in self.rules.values():
            if rule.reads is not None and rule.reads.column not in found.setdefault(rule.reads.scores, []):
                found[rule.reads.scores].append(rule.reads.column)
        return found

    @property
    def mask(self) -> tuple[PersonalKind, ...]:
        """Personal data that is masked in captions as they are read."""
        masking = [rule for rule in self.rules.values() if isinstance(rule, text_rules.Personal) and rule.action == "mask"]
        return tuple(kind for kind in PersonalKind if any(kind in rule.kinds for rule in masking))

    @property
    def passes(self) -> int:
        """Over the index, to count, before these can judge."""
        return sum(rule.passes for rule in self.rules.values() if isinstance(rule, CountingRule))

    def counted_for(self, name: str) -> RuleSet:
        """The rule `name`, behind those that decide whom it counts."""
        rules = list(self.rules.items())
        last = list(self.rules).index(name)
        rule = self.rules[name]
        return RuleSet(dict(rules[last if isinstance(rule, CountingRule) and rule.of_all else 0 : last + 1]))

    def count(self, rows: Rows) -> NDArray[np.int64]:
        """What the last rule counts among those that the others keep."""
        *before, last = self.rules
        rule = self.rules[last]
        assert isinstance(rule, CountingRule), "only these count"
        return rule.count(rows, RuleSet({name: self.rules[name] for name in before}).judge(rows).first < 0)

    def settled(self, counted: Callable[[RuleSet], NDArray[np.int64]]) -> RuleSet:
        """These rules, ready to judge: each that counts knows its counts, in the file's order, as those before it decide whom it counts.

        Args:
            counted: the sum over the whole index of what `count` gives of a rule set.

        Raises:
            DataError: a rule that its counts leave nothing to decide by.
        """
        rules = self
        for name in self.rules:
            while isinstance(rule := rules.rules[name], CountingRule) and rule.passes:
                counts = counted(rules.counted_for(name))
                try:
                    rules = rules.with_rule(name, rule.learn(counts))
                except DataError as error:
                    raise DataError(f"rule {name!r}: {error}") from None
        return rules

    def with_rule(self, name: str, rule: Rule) -> RuleSet:
        """`rule` in the place of the one that is called so."""
        return replace(self, rules={**self.rules, name: rule})

    @property
    def hash(self) -> str:
        """Of the rules, their parameters, order and versions, however the file spells them, and of what they look up."""
        rules = [[name, rule.model_dump(mode="json"), rule.version, rule.tables] for name, rule in self.rules.items()]
        return hashlib.blake2b(json.dumps(rules, sort_keys=True).encode(), digest_size=16).hexdigest()

    def check_modalities(self, has: tuple[str, ...], url: str) -> None:
        """
        Raises:
            ConfigError: a rule about what the samples of the index at `url` do not have.
        """
        for name, rule in self.rules.items():
            if rule.modality is not None and rule.modality not in has:
                raise ConfigError(f"rule {name!r} judges {rule.modality}s, and the samples of {url} need not have any: leave it out")

    def judge(self, rows: Rows) -> Verdict:
        first, fails = np.full(len(rows), -1), np.zeros(len(rows), dtype=np.uint64)
        judgements = []
        for number, rule in enumerate(self.rules.values()):
            judgement = rule.judge(rows)
            judgements.append(judgement)
            first[~judgement.keep & (first < 0)] = number
            fails |= (~judgement.keep).astype(np.uint64) << np.uint64(number)
        return Verdict(first, fails, judgements)


def schema() -> dict[str, Any]:
    """The JSON Schema of a file of rules."""
    kinds = {name: kind.model_json_schema() for name, kind in RULES.items()}
    for kind in kinds.values():
        kind["required"] = ["rule", *(key for key in kind.get("required", ()) if key != "rule")]
    definitions = {key: value for kind in kinds.values() for key, value in kind.pop("$defs", {}).items()} | kinds
    options = [{"$ref": f"#/$defs/{name}"} for name in kinds]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mm rules",
        "type": "object",
        "required": ["rules"],
        "additionalProperties": False,
        "properties": {
            "rules": {"type": "object", "minProperties": 1, "maxProperties": MAX_RULES, "additionalProperties": {"oneOf": options}}
        },
        "$defs": definitions,
    }


def _parse_rule(name: str, values: Any, where: str, folder: Path | None) -> Rule:
    if not isinstance(values, dict) or not isinstance(values.get("rule"), str):
        raise ConfigError(f"{where}: rule {name!r} does not say which rule it is: {name}: {{rule: shorter_side, min: 200}}")
    kind = RULES.get(values["rule"])
    if kind is None:
        raise ConfigError(f"{where}: rule {name!r}: there is no rule {values['rule']!r}{nearest(values['rule'], list(RULES))}")
    for key in values:
        if key not in kind.model_fields:
            raise ConfigError(
                f"{where}: rule {name!r}: {values['rule']} has no parameter {key!r}{nearest(str(key), list(kind.model_fields))}"
            )
    try:
        return validate(kind, values, {"folder": folder})
    except ConfigError as error:
        raise ConfigError(f"{where}: rule {name!r}: {error}") from None
