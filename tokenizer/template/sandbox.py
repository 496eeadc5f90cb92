"""Chat templates run in jinja2's sandbox."""

from collections.abc import Iterable
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.parser
import jinja2.runtime
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner
from jinja2.utils import Namespace as JinjaNamespace
from jinja2.visitor import NodeTransformer

from octo_run.tokenizer.template.budget import INTEGER_BITS, METER, Meter, OverBudget
from octo_run.tokenizer.template.filters import FILTERS, TESTS, arithmetic, compare, cut, each, key, negative
from octo_run.tokenizer.template.text import Text, Weight, given, is_own, joined, lifted, text_of, written

#: Characters of a template at most (the longest real ones have some 30,000).
MAX_SOURCE = 1 << 18
#: Nodes of a parsed template at most.
MAX_NODES = 50_000
#: Branches of a template times its names at most: jinja2 follows all names through all branches.
MAX_BRANCHES = 2_000_000
MAX_RANGE = 100_000


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks answers for training; here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


_BRANCHES = (nodes.If, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport)


class _Metered(NodeTransformer):
    """Puts counted functions in the place of what jinja2 turns into bare Python: loops, comparisons, slices, dicts."""

    def __init__(self) -> None:
        self.count = self.branches = self.bytes = 0
        self.names: set[str] = set()

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise TemplateSyntaxError(f"it has more than {MAX_NODES:,} parts", node.lineno)
        self.branches += isinstance(node, _BRANCHES)
        if isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)):
            self.bytes += 64 + 128 * len(node.items)
        if isinstance(node, nodes.Name):
            self.names.add(node.name)
        if self.branches * len(self.names) > MAX_BRANCHES:
            raise TemplateSyntaxError("it has too many branches and names", node.lineno)
        changed: nodes.Node = super().visit(node)
        return changed

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, int) and node.value.bit_length() > INTEGER_BITS:
            raise TemplateSyntaxError("a number is too large", node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        return _through(" compare", node.expr, [part for o in node.ops for part in (nodes.Const(o.op), o.expr)])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        return _through(
            " cut", node.node, [p or nodes.Const(None) for p in (node.arg.start, node.arg.stop, node.arg.step)]
        )

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _through(" key", node.key, [])
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError("the statement autoescape cannot be used here", node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        price = 0 if node.test is None else 2 + sum(1 for _ in node.test.find_all(nodes.Node))
        self._count_body(node)
        node.iter = _through(" each", node.iter, [nodes.Const(price)])
        return node

    def _count_body(self, node: Any) -> nodes.Node:
        before, bytes_before = self.count, self.bytes
        self.generic_visit(node)
        step = _through(" step", nodes.Const(self.count - before), [nodes.Const(512 + self.bytes - bytes_before)])
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _count_body


def _through(name: str, value: Any, arguments: list[Any]) -> nodes.Filter:
    node = nodes.Filter(value, name, arguments, [], None, None)
    node.set_lineno(value.lineno)
    return node


class _Generator(CodeGenerator):
    """Marks the template's own texts as such."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, str):
            self.write(f"own[{node.value!r}]")
        else:
            super().visit_Const(node, frame)

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"own[{''.join(group)!r}]"

    def _make_finalize(self) -> CodeGenerator._FinalizeInfo:
        return self._FinalizeInfo(None, None)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        self.write("text_of(")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Own(dict[str, Text]):
    """The texts that stand in a template."""

    def __missing__(self, text: str) -> Text:
        return self.setdefault(text, written(text))


class Namespace(JinjaNamespace):
    """``namespace()``: the only value that a template can change."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")
        METER.get().make(128)
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    METER.get().make(512)
    namespace = Namespace()
    for name, value in _dict(*args, **kwargs).items():
        namespace[name] = value
    return namespace


def _dict(source: Any = (), /, **values: Any) -> dict[Any, Any]:
    METER.get().items(3 * len(values))
    return dict(source if isinstance(source, dict) else key(each(source)), **values)


def _range(*bounds: Any) -> Any:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise OverflowError(f"a range of more than {MAX_RANGE:,} numbers")
    if all(map(is_own, bounds)):
        return numbers
    METER.get().items(len(numbers))
    return [given(number) for number in numbers]


def _step(operations: int, size: int) -> None:
    METER.get().make(size)
    METER.get().work(operations)


# fmt: off
#: What may stand behind a dot, beside the items of a dict.
_NAMES = """
strip lstrip rstrip split rsplit splitlines partition rpartition removeprefix removesuffix replace join ljust rjust
center zfill expandtabs upper lower swapcase casefold title capitalize format format_map find rfind index rindex count
startswith endswith isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle
isupper items keys values get copy is_integer grouper list next reset current name arguments catch_kwargs
catch_varargs caller cycle changed depth depth0 first last length index0 revindex revindex0 previtem nextitem
"""
READABLE = frozenset(_NAMES.split())
# fmt: on


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    concat = staticmethod(joined)
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    intercepted_unops = frozenset(ImmutableSandboxedEnvironment.default_unop_table)

    def __init__(self) -> None:
        extensions = [_GenerationTag, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, cache_size=0)
        parts: dict[str, Any] = {" compare": compare, " cut": cut, " key": key, " each": each, " step": _step}
        self.filters: dict[str, Any] = {**FILTERS, **parts}
        self.tests: dict[str, Any] = TESTS
        self.globals = {
            "range": _range,
            "dict": _dict,
            "namespace": _namespace,
            "cycler": lambda *values: Cycler(*values),
            "joiner": lambda sep=", ": Joiner(sep),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        return tree

    def _load_template(self, name: str, globals: Any) -> jinja2.Template:
        raise SecurityError("it loads another template")

    def getattr(self, obj: Any, attribute: str) -> Any:
        METER.get().work(1)
        return super().getattr(lifted(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, (str, int)):
            Weight(argument)
        METER.get().work(1)
        return super().getitem(lifted(obj), argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr in READABLE or (isinstance(obj, Namespace) and not attr.startswith("_"))

    def wrap_str_format(self, value: Any) -> Any:
        if not isinstance(value, BuiltinMethodType) or value.__name__ not in ("format", "format_map"):
            return None
        fill, formatter = lifted(value.__self__).filled, SandboxedFormatter(self)
        if value.__name__ == "format":
            return lambda *args, **kwargs: fill(formatter, args, kwargs)
        return lambda values: fill(formatter, (), values)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.make(256)
        if not isinstance(__obj, Macro):
            owner = getattr(__obj, "__self__", None)
            Weight((owner, args, kwargs))
            if isinstance(owner, str) and args:
                meter.search(owner, args[0] if __obj.__name__ in ("rfind", "rindex") else "")
        return lifted(super().call(__context, __obj, *args, **kwargs))

    def _filter_test_common(self, name: Any, *args: Any) -> Any:
        return super()._filter_test_common(key(name), *args)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return arithmetic(operator, left, right)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        return negative(operator, arg)


_ENVIRONMENT = _Environment()


class Program:
    """A template ready to run.

    Raises:
        Exception: The template cannot be made: jinja2.TemplateSyntaxError, RecursionError and others.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateSyntaxError(f"it has {len(source):,} characters, more than {MAX_SOURCE:,}", 1)
        self._source, self._template = source, _ENVIRONMENT.from_string(source)
        names = {"own": _Own(), "text_of": text_of, "Namespace": Namespace}
        self._template.root_render_func.__globals__.update(names)

    @property
    def variables(self) -> frozenset[str]:
        """The names that the template takes from outside."""
        return frozenset(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(self._source)))

    def run(self, values: dict[str, Any], meter: Meter) -> Text:
        """The text that the template writes.

        Raises:
            Exception: Any kind, as a template is a program.
        """
        before = METER.set(meter)
        try:
            parts = list(self._template.root_render_func(self._template.new_context(values)))
            if sum(map(len, parts)) > meter.result:
                raise OverBudget("it makes too much text")
            return joined(parts)
        finally:
            METER.reset(before)
