"""Chat templates as programs: jinja2 parses them, this module runs them.

jinja2 turns a template into Python code, which can do what Python can and as long as it likes. Here each node of the
parsed template becomes a closure over a `Scope` instead. Only the values of `template.values` exist, each step is
counted (see `template.text.Meter`), and each character of the result knows whether the template wrote it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError, TemplateSyntaxError

from octo_run.tokenizer.template.expressions import Expression, Expressions, Scope
from octo_run.tokenizer.template.format import to_text
from octo_run.tokenizer.template.text import Meter, OverBudget, join, written
from octo_run.tokenizer.template.values import (
    Callee,
    Namespace,
    Undefined,
    equal,
    iterate,
)

#: Characters of a template at most (the longest real ones have some 30,000).
MAX_SOURCE = 1 << 18

Output = list[str]
GO_ON, BREAK, CONTINUE = range(3)
Statement = Callable[[Scope, Output], int]
Assign = Callable[[Scope, Any], None]


class Program:
    """A template ready to run. Errors when it is made: jinja2.TemplateSyntaxError, RecursionError."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateSyntaxError(f"it has {len(source):,} characters, more than {MAX_SOURCE:,}", 1)
        tree = _PARSER.parse(source)
        self._body = _Compiler().block(tree.body)

    def run(self, values: dict[str, Any], meter: Meter) -> str:
        """The text that the template writes. Errors: any Exception, as a template is a program."""
        output: Output = []
        self._body(Scope({}, Scope(values, None, meter), meter), output)
        if sum(map(len, output)) > meter.result:
            raise OverBudget("it makes too much text")
        return join(meter, output)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks answers for training; here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


_PARSER = jinja2.Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols], cache_size=0
)


class _Compiler(Expressions):
    """Makes the closures of statements too."""

    def __init__(self) -> None:
        super().__init__()
        self.in_loop = False

    def block(self, body: Sequence[nodes.Node]) -> Statement:
        around, self.weight = self.weight, 1
        statements = [self.statement(node) for node in body]
        weight, self.weight = self.weight, around

        def run(scope: Scope, output: Output) -> int:
            scope.meter.work(weight)
            for statement in statements:
                signal = statement(scope, output)
                if signal:
                    return signal
            return GO_ON

        return run

    def statement(self, node: nodes.Node) -> Statement:
        self.count(node)
        make: Callable[[Any], Statement] | None = getattr(self, "run_" + type(node).__name__, None)
        if make is None:
            raise TemplateSyntaxError(f"the statement {type(node).__name__.lower()} cannot be used here", node.lineno)
        return make(node)

    # Statements

    def run_Output(self, node: nodes.Output) -> Statement:
        values = self.expressions(node.nodes)

        def run(scope: Scope, output: Output) -> int:
            for value in values:
                output.append(to_text(scope.meter, value(scope)))
            return GO_ON

        return run

    def run_If(self, node: nodes.If) -> Statement:
        cases = [(self.expression(part.test), self.block(part.body)) for part in (node, *node.elif_)]
        otherwise = self.block(node.else_)

        def run(scope: Scope, output: Output) -> int:
            for test, body in cases:
                if test(scope):
                    return body(scope, output)
            return otherwise(scope, output)

        return run

    def run_For(self, node: nodes.For) -> Statement:
        source, assign = self.expression(node.iter), self.target(node.target)
        test = None if node.test is None else self.expression(node.test)
        around, self.in_loop = self.in_loop, True
        body = self.block(node.body)
        self.in_loop = around
        otherwise = self.block(node.else_)
        recursive = node.recursive

        def loop_over(scope: Scope, output: Output, values: Any, depth: int) -> int:
            meter = scope.meter
            items = iterate(meter, values)
            if test is not None:
                items = [entry for entry in items if _passes(scope, assign, test, entry)]
            loop = _Loop(items, depth, partial(again, scope, depth + 1) if recursive else None)
            for loop.index0, entry in enumerate(items):
                inner = scope.inner()
                meter.work(2)
                assign(inner, entry)
                inner.names["loop"] = loop
                if body(inner, output) == BREAK:
                    break
            return GO_ON if items else otherwise(scope.inner(), output)

        def again(scope: Scope, depth: int, meter: Meter, values: Any) -> str:
            part: Output = []
            loop_over(scope, part, values, depth)
            return join(meter, part)

        return lambda scope, output: loop_over(scope, output, source(scope), 0)

    def run_Break(self, node: nodes.Break) -> Statement:
        return self._signal(node, BREAK)

    def run_Continue(self, node: nodes.Continue) -> Statement:
        return self._signal(node, CONTINUE)

    def _signal(self, node: nodes.Node, signal: int) -> Statement:
        if not self.in_loop:
            raise TemplateSyntaxError(f"{type(node).__name__.lower()} stands outside a loop", node.lineno)
        return lambda scope, output: signal

    def run_Assign(self, node: nodes.Assign) -> Statement:
        value, assign = self.expression(node.node), self.target(node.target)

        def run(scope: Scope, output: Output) -> int:
            assign(scope, value(scope))
            return GO_ON

        return run

    def run_AssignBlock(self, node: nodes.AssignBlock) -> Statement:
        body, assign = self.apart(node.body), self.target(node.target)
        change = None if node.filter is None else self._filtered(node.filter)

        def run(scope: Scope, output: Output) -> int:
            text = body(scope)
            assign(scope, text if change is None else change(scope, text))
            return GO_ON

        return run

    def run_FilterBlock(self, node: nodes.FilterBlock) -> Statement:
        body, change = self.apart(node.body), self._filtered(node.filter)

        def run(scope: Scope, output: Output) -> int:
            output.append(to_text(scope.meter, change(scope, body(scope))))
            return GO_ON

        return run

    def run_With(self, node: nodes.With) -> Statement:
        pairs = [(self.target(t), self.expression(v)) for t, v in zip(node.targets, node.values, strict=True)]
        body = self.block(node.body)

        def run(scope: Scope, output: Output) -> int:
            inner = scope.inner()
            for assign, value in pairs:
                assign(inner, value(scope))
            return body(inner, output)

        return run

    def run_Scope(self, node: nodes.Scope) -> Statement:
        body = self.block(node.body)
        return lambda scope, output: body(scope.inner(), output)

    run_Block = run_Scope

    def run_Macro(self, node: nodes.Macro) -> Statement:
        make, name = self.macro(node.name, node), node.name

        def run(scope: Scope, output: Output) -> int:
            scope.names[name] = make(scope)
            return GO_ON

        return run

    def run_CallBlock(self, node: nodes.CallBlock) -> Statement:
        make, called = self.macro("caller", node), self._call(node.call)

        def run(scope: Scope, output: Output) -> int:
            output.append(to_text(scope.meter, called(scope, {"caller": make(scope)})))
            return GO_ON

        return run

    def run_ExprStmt(self, node: nodes.ExprStmt) -> Statement:
        value = self.expression(node.node)

        def run(scope: Scope, output: Output) -> int:
            value(scope)
            return GO_ON

        return run

    def run_Include(self, node: nodes.Stmt) -> Statement:
        def run(scope: Scope, output: Output) -> int:
            raise SecurityError("it loads another template")

        return run

    run_Import = run_FromImport = run_Extends = run_Include

    # Parts of statements

    def apart(self, body: Sequence[nodes.Node]) -> Expression:
        """A block whose output is a value."""
        around, self.in_loop = self.in_loop, False
        block = self.block(body)
        self.in_loop = around

        def get(scope: Scope) -> str:
            output: Output = []
            block(scope.inner(), output)
            return join(scope.meter, output)

        return get

    def target(self, node: nodes.Node) -> Assign:
        self.count(node)
        if isinstance(node, nodes.Name):
            name = node.name

            def assign(scope: Scope, value: Any) -> None:
                scope.names[name] = value

            return assign
        if isinstance(node, nodes.NSRef):
            return _assign_attribute(node.name, node.attr)
        if not isinstance(node, (nodes.Tuple, nodes.List)):
            raise TemplateSyntaxError("a value can be given to a name only", node.lineno)
        targets = [self.target(part) for part in node.items]

        def assign_all(scope: Scope, value: Any) -> None:
            values = iterate(scope.meter, value)
            if len(values) != len(targets):
                few = len(values) < len(targets)
                raise ValueError(f"{'not enough' if few else 'too many'} values to unpack (expected {len(targets)})")
            for target, part in zip(targets, values, strict=True):
                target(scope, part)

        return assign_all

    def macro(self, name: str, node: "nodes.Macro | nodes.CallBlock") -> Callable[[Scope], "_Macro"]:
        arguments = [argument.name for argument in node.args]
        defaults = dict(zip(reversed(arguments), reversed(self.expressions(node.defaults)), strict=False))
        around, self.in_loop = self.in_loop, False
        body = self.block(node.body)
        self.in_loop = around
        used = {name.name for statement in node.body for name in statement.find_all(nodes.Name)}
        used |= {part.name for part in node.body if isinstance(part, nodes.Name)}
        special = frozenset({"varargs", "kwargs", "caller"} & used - set(arguments))

        def make(scope: Scope) -> _Macro:
            scope.meter.make(512)
            return _Macro(name, arguments, defaults, special, body, scope)

        return make


def _passes(scope: Scope, assign: Assign, test: Expression, entry: Any) -> Any:
    inner = scope.inner()
    inner.meter.work(4)
    assign(inner, entry)
    return test(inner)


def _assign_attribute(name: str, attr: str) -> Assign:
    def assign(scope: Scope, value: Any) -> None:
        namespace = scope.look(name)
        if not isinstance(namespace, Namespace):
            raise TemplateRuntimeError("cannot assign attribute on non-namespace object")
        scope.meter.make(128)
        namespace.set(attr, value)

    return assign


class _Loop(Callee):
    """``loop`` inside a ``for``."""

    __slots__ = ("changed_value", "depth0", "index0", "items")
    kind = "loop"

    def __init__(self, items: Sequence[Any], depth0: int, again: Callable[..., str] | None) -> None:
        super().__init__(again or self._not_recursive)
        self.items = items
        self.depth0 = depth0
        self.index0 = 0
        self.changed_value: Any = None

    def _not_recursive(self, meter: Meter, values: Any) -> str:
        raise TypeError("The loop must have the 'recursive' marker to be called recursively.")

    def attribute(self, meter: Meter, name: str) -> Any:
        i, items = self.index0, self.items
        if name == "index":
            return i + 1
        if name == "index0":
            return i
        if name == "first":
            return i == 0
        if name == "last":
            return i + 1 == len(items)
        if name == "length":
            return len(items)
        if name == "revindex":
            return len(items) - i
        if name == "revindex0":
            return len(items) - i - 1
        if name == "previtem":
            return items[i - 1] if i else Undefined("there is no previous item")
        if name == "nextitem":
            return items[i + 1] if i + 1 < len(items) else Undefined("there is no next item")
        if name in ("depth", "depth0"):
            return self.depth0 + (name == "depth")
        return {"cycle": Callee(self._cycle), "changed": Callee(self._changed)}.get(name)

    def _cycle(self, meter: Meter, *values: Any) -> Any:
        if not values:
            raise TypeError("no items for cycling given")
        return values[self.index0 % len(values)]

    def _changed(self, meter: Meter, *values: Any) -> bool:
        before, self.changed_value = self.changed_value, values
        return before is None or not equal(meter, before, values)


class _Macro(Callee):
    """A macro, or the body of a call block."""

    __slots__ = ("arguments", "body", "defaults", "name", "scope", "special")
    kind = "macro"

    def __init__(
        self,
        name: str,
        arguments: list[str],
        defaults: dict[str, Expression],
        special: frozenset[str],
        body: Statement,
        scope: Scope,
    ) -> None:
        super().__init__(self._run)
        self.name = name
        self.arguments = arguments
        self.defaults = defaults
        self.special = special
        self.body = body
        self.scope = scope

    def attribute(self, meter: Meter, name: str) -> Any:
        if name == "name":
            return written(self.name)
        if name == "arguments":
            return tuple(map(written, self.arguments))
        if name in ("catch_kwargs", "catch_varargs", "caller"):
            return {"catch_kwargs": "kwargs", "catch_varargs": "varargs"}.get(name, name) in self.special
        return None

    def _run(self, meter: Meter, /, *args: Any, **kwargs: Any) -> str:
        inner = self.scope.inner()
        for name, value in zip(self.arguments, args, strict=False):
            inner.names[name] = value
        for name in self.arguments[len(args) :]:
            if name in kwargs:
                inner.names[name] = kwargs.pop(name)
            elif name in self.defaults:
                inner.names[name] = self.defaults[name](inner)
            else:
                inner.names[name] = Undefined(f"parameter {name!r} was not provided")
        if "caller" in self.special:
            inner.names["caller"] = kwargs.pop("caller", None) or Undefined("No caller defined")
        if "varargs" in self.special:
            inner.names["varargs"] = args[len(self.arguments) :]
        elif len(args) > len(self.arguments):
            raise TypeError(f"macro {self.name!r} takes not more than {len(self.arguments)} argument(s)")
        if "kwargs" in self.special:
            inner.names["kwargs"] = kwargs
        elif kwargs:
            raise TypeError(f"macro {self.name!r} takes no keyword argument {next(iter(kwargs))!r}")
        output: Output = []
        self.body(inner, output)
        return join(meter, output)
