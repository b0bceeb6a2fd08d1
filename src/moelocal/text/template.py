"""The chat template of a checkpoint: messages to the text that the model was trained on.

Templates are programs from strangers. They run in the sandbox, and in the environment, that transformers 5
gives them (`transformers.utils.chat_template_utils`), so that they render the same text byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from moelocal.errors import TemplateError

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(
        self, source: str, *, tool_source: str | None = None, variables: Mapping[str, Any] | None = None
    ) -> None:
        """`tool_source`: the template for requests with tools, where a checkpoint has its own. `variables`:
        what templates may read, such as `bos_token`.

        Raises TemplateError if a template does not compile.
        """
        self.source = source
        self._template = _compile(source)
        self._tool_template = self._template if tool_source is None else _compile(tool_source)
        self._variables = dict(variables or {})

    @classmethod
    def open(cls, folder: Path) -> ChatTemplate:
        """Read `chat_template.jinja`, else `chat_template.json`, else `chat_template` of
        `tokenizer_config.json`.

        Raises TemplateError when none of them has a template, or a file is damaged.
        """
        config = _read_object(folder / "tokenizer_config.json")
        variables = _special_tokens(folder, config)
        plain = folder / "chat_template.jinja"
        if plain.is_file():
            try:
                return cls(plain.read_text(encoding="utf-8"), variables=variables)
            except (OSError, UnicodeDecodeError) as error:
                raise TemplateError(f"{plain}: not readable as UTF-8 text ({error})") from error
        legacy = folder / "chat_template.json"
        for path, content in ((legacy, _read_object(legacy)), (folder / "tokenizer_config.json", config)):
            template = content.get("chat_template")
            if template is None:
                continue
            if isinstance(template, str):
                return cls(template, variables=variables)
            named = _named_templates(path, template)
            return cls(named["default"], tool_source=named.get("tool_use"), variables=variables)
        raise TemplateError(
            f"{folder}: no chat template in chat_template.jinja, chat_template.json or "
            "tokenizer_config.json; add the template of the original model, "
            "or pass plain text to continue (raw=True)"
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt. `thinking` sets the template's `enable_thinking`; None leaves the choice to the
        template.

        Raises TemplateError with the template's own message when it refuses the messages, and for every other
        error inside the template.
        """
        if thinking is not None:
            variables["enable_thinking"] = thinking
        template = self._template if tools is None else self._tool_template
        try:
            # `documents` is None in transformers too: some templates test it without `is defined`.
            return template.render(
                **{
                    **self._variables,
                    "messages": list(messages),
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **variables,
                }
            )
        except RecursionError as error:
            raise TemplateError("the chat template failed: it calls itself without end") from error
        except (
            Exception
        ) as error:  # the template is foreign code: whatever it raises is an error of the template
            raise TemplateError(f"the chat template failed: {_message(error)}") from error


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template does not compile: line {error.lineno}: {error.message}"
        ) from error
    except RecursionError as error:
        raise TemplateError("the chat template does not compile: it is nested too deeply") from error
    except Exception as error:  # of the Python that jinja2 generates, as for a lone break
        raise TemplateError(f"the chat template does not compile: {_message(error)}") from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own tokens for training; rendering passes its content through."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without access to the attributes of the builtin class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` that refuses names with a leading underscore, a way out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Without a parameter named self, so that a template may write namespace(self=1), as in jinja2.
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter sorts keys and escapes < > & ', which is another prompt than the one trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty without the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TemplateError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise TemplateError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _named_templates(path: Path, entries: Any) -> dict[str, str]:
    """Older checkpoints have a list of {"name", "template"} objects, or an object from name to template."""
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        entries = {entry.get("name"): entry.get("template") for entry in entries}
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise TemplateError(f"{path}: chat_template is neither a string nor a list of named templates")
    if "default" not in entries:
        raise TemplateError(f"{path}: no chat template named 'default', found {sorted(map(str, entries))}")
    return entries


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token` and the like, as strings; each is absent where the checkpoint has none."""
    tokens: dict[str, Any] = {}
    for source in (_read_object(folder / "special_tokens_map.json"), config):
        for name in _SPECIAL_TOKENS:
            value = source.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[name] = value
    return tokens
