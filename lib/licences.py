"""Licences of base models that an adapter is made from: what they are called, and what they ask of whoever shares one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lib.config import EMBEDDED_MODEL


@dataclass(frozen=True)
class Licence:
    """A base model's licence.

    Attributes:
        tag: as the Hub's metadata has it; `other` for one that is not known here.
        name: in words.
        url: of its text.
        prefix: how a derived model's name must begin ("" where it need not).
        built_with: words to be shown prominently.
        notice: content of a file NOTICE that goes with every copy.
        duties: in words.
    """

    tag: str
    name: str
    url: str = ""
    prefix: str = ""
    built_with: str = ""
    notice: str = ""
    duties: str = ""


def _llama(version: str) -> Licence:
    name = f"Llama {version} Community License"
    path = version.replace(".", "_")
    return Licence(
        tag=f"llama{version}",
        name=name,
        url=f"https://www.llama.com/llama{path}/license/",
        prefix="Llama",
        built_with="Built with Llama",
        notice=f"Llama {version} is licensed under the {name}, Copyright © Meta Platforms, Inc. All Rights Reserved.\n",
        duties=(
            "Whoever passes this adapter on gives a copy of that agreement along, keeps the file NOTICE, shows “Built with Llama”, begins "
            f"the name of any derived model with “Llama”, and keeps to the acceptable use policy (https://www.llama.com/llama{path}/use-policy/)."
        ),
    )


_APACHE = Licence("apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0")
_GEMMA = Licence(
    tag="gemma",
    name="Gemma Terms of Use",
    url="https://ai.google.dev/gemma/terms",
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n",
    duties="Whoever passes this adapter on gives a copy of those terms along, keeps the file NOTICE, and passes on their limits of use.",
)
_UNKNOWN = Licence(
    "other", "not known to this study", duties="Look up the base model's licence, and state it here, before this adapter is shared."
)

_KNOWN: tuple[tuple[str, Licence], ...] = (
    (r"llama-3\.1\b", _llama("3.1")),
    (r"llama-3\.2\b", _llama("3.2")),
    (r"llama-3\.3\b", _llama("3.3")),
    (r"smollm", _APACHE),
    (r"gemma-[123]", _GEMMA),
    (r"qwen3-", _APACHE),
    (r"qwen2\.5-(?!3b|72b)", _APACHE),  # those two have licences of their own
)


def of(model_name: str) -> Licence:
    """Returns the licence of a base model, told by its name: the embedded model's, or a Hub id's. A folder's is not known.

    Other publishers' models that bear `Llama` in their names are taken for Llama's, which errs to the side of duties.
    """
    if model_name == EMBEDDED_MODEL or re.fullmatch(r"[\w\-.]+/[\w\-.]+", model_name):
        word = model_name.rpartition("/")[2].lower()
        return next((licence for pattern, licence in _KNOWN if re.search(pattern, word)), _UNKNOWN)
    return _UNKNOWN
