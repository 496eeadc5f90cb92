"""Chat templates as programs: jinja2 parses them, this module runs them.

jinja2 turns a template into Python code, which can do what Python can and as long as it likes. Here each node of the
parsed template becomes a closure over a `Scope` instead. Only the values of `template_values` exist, each step is
counted (see `template_text.Meter`), and each character of the result knows whether the template wrote it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError, TemplateSyntaxError

from octo_run.tokenizer.template_filters import apply_filter, apply_test, remainder
from octo_run.tokenizer.template_format import to_text
from octo_run.tokenizer.template_methods import attribute, item
from octo_run.tokenizer.template_text import INTEGER_BITS, Meter, join, written
from octo_run.tokenizer.template_values import (
    Callee,
    Namespace,
    Undefined,
    arithmetic,
    call,
    compare,
    equal,
    given,
    is_given,
    iterate,
    key,
    kind,
)

#: Characters of a template at most (the longest real ones have some 30,000).
MAX_SOURCE = 1 << 18
#: Nodes of a parsed template at most.
MAX_NODES = 50_000


class Scope:
    """Names and their values; what is not here is looked for in the scope around."""

    __slots__ = ("meter", "names", "parent")

    def __init__(self, names: dict[str, Any], parent: "Scope | None", meter: Meter) -> None:
        self.names = names
        self.parent = parent
        self.meter = meter

    def inner(self) -> "Scope":
        return Scope({}, self, self.meter)

    def look(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None


Expression = Callable[[Scope], Any]
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


class _Compiler:
    """Closures of nodes. ``weight``: nodes of the present block so far, the price of running it once."""

    def __init__(self) -> None:
        self.weight = 0
        self.total = 0
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

    def expression(self, node: nodes.Node) -> Expression:
        self.count(node)
        make: Callable[[Any], Expression] | None = getattr(self, "get_" + type(node).__name__, None)
        if make is None:
            raise TemplateSyntaxError(f"the expression {type(node).__name__.lower()} cannot be used here", node.lineno)
        return make(node)

    def expressions(self, many: Sequence[nodes.Node]) -> list[Expression]:
        return [self.expression(node) for node in many]

    def count(self, node: nodes.Node) -> None:
        self.weight += 1
        self.total += 1
        if self.total > MAX_NODES:
            raise TemplateSyntaxError(f"it has more than {MAX_NODES:,} parts", node.lineno)

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

    # Expressions

    def get_Const(self, node: nodes.Const) -> Expression:
        value = node.value
        if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            raise TemplateSyntaxError("a number is too large", node.lineno)
        if not isinstance(value, (str, int, float, type(None))):
            raise TemplateSyntaxError("a number is no real number", node.lineno)
        constant = written(value) if isinstance(value, str) else value
        return lambda scope: constant

    def get_TemplateData(self, node: nodes.TemplateData) -> Expression:
        text = written(node.data)
        return lambda scope: text

    def get_Name(self, node: nodes.Name) -> Expression:
        name = node.name
        missing = Undefined(f"{name!r} is undefined")

        def get(scope: Scope) -> Any:
            around: Scope | None = scope
            while around is not None:
                if name in around.names:
                    return around.names[name]
                around = around.parent
            return missing

        return get

    def get_NSRef(self, node: nodes.NSRef) -> Expression:
        raise TemplateSyntaxError("an attribute is given a value where it cannot be", node.lineno)

    def get_List(self, node: nodes.List) -> Expression:
        items = self.expressions(node.items)

        def get(scope: Scope) -> list[Any]:
            scope.meter.items(len(items))
            return [value(scope) for value in items]

        return get

    def get_Tuple(self, node: nodes.Tuple) -> Expression:
        items = self.get_List(nodes.List(node.items))
        return lambda scope: tuple(items(scope))

    def get_Dict(self, node: nodes.Dict) -> Expression:
        pairs = [(self.expression(pair.key), self.expression(pair.value)) for pair in node.items]

        def get(scope: Scope) -> dict[Any, Any]:
            scope.meter.items(3 * len(pairs))
            return {key(name(scope)): value(scope) for name, value in pairs}

        return get

    def get_Getattr(self, node: nodes.Getattr) -> Expression:
        value, name = self.expression(node.node), node.attr
        return lambda scope: attribute(scope.meter, value(scope), name)

    def get_Getitem(self, node: nodes.Getitem) -> Expression:
        value, name = self.expression(node.node), self.expression(node.arg)
        return lambda scope: item(scope.meter, value(scope), name(scope))

    def get_Slice(self, node: nodes.Slice) -> Expression:
        parts = [
            (lambda scope: None) if part is None else self.expression(part)
            for part in (node.start, node.stop, node.step)
        ]

        def get(scope: Scope) -> slice:
            bounds = [part(scope) for part in parts]
            for bound in bounds:
                if isinstance(bound, Undefined):
                    raise bound.fail()
                if bound is not None and not isinstance(bound, int):
                    raise TypeError("slice indices must be integers or None")
            return slice(*bounds)

        return get

    def get_Call(self, node: nodes.Call) -> Expression:
        called = self._call(node)
        return lambda scope: called(scope, {})

    def _call(self, node: nodes.Call) -> Callable[[Scope, dict[str, Any]], Any]:
        callee, arguments = self.expression(node.node), self._arguments(node)

        def run(scope: Scope, more: dict[str, Any]) -> Any:
            function = callee(scope)
            args, kwargs = arguments(scope)
            return call(scope.meter, function, args, {**kwargs, **more})

        return run

    def _arguments(
        self, node: "nodes.Call | nodes.Filter | nodes.Test"
    ) -> Callable[[Scope], tuple[list[Any], dict[str, Any]]]:
        positional = self.expressions(node.args)
        named = [(str(pair.key), self.expression(pair.value)) for pair in node.kwargs]
        more = None if node.dyn_args is None else self.expression(node.dyn_args)
        more_named = None if node.dyn_kwargs is None else self.expression(node.dyn_kwargs)

        def get(scope: Scope) -> tuple[list[Any], dict[str, Any]]:
            args = [value(scope) for value in positional]
            kwargs = {name: value(scope) for name, value in named}
            if more is not None:
                args += iterate(scope.meter, more(scope))
                scope.meter.items(len(args))
            if more_named is not None:
                values = more_named(scope)
                if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
                    raise TypeError("argument after ** must be a mapping with names")
                scope.meter.items(3 * len(values))
                kwargs.update((str(name), value) for name, value in values.items())
            return args, kwargs

        return get

    def get_Filter(self, node: nodes.Filter) -> Expression:
        if node.node is None:
            raise TemplateSyntaxError("a filter has nothing to work on", node.lineno)
        value, change = self.expression(node.node), self._filtered(node, inner=False)
        return lambda scope: change(scope, value(scope))

    def _filtered(self, node: nodes.Filter, inner: bool = True) -> Callable[[Scope, Any], Any]:
        """The change that a filter makes, and before it, if ``inner``, those of the filters it stands after."""
        name, arguments = node.name, self._arguments(node)
        first = self._filtered(node.node) if inner and isinstance(node.node, nodes.Filter) else None

        def change(scope: Scope, value: Any) -> Any:
            value = value if first is None else first(scope, value)
            args, kwargs = arguments(scope)
            return apply_filter(scope.meter, name, value, args, kwargs)

        return change

    def get_Test(self, node: nodes.Test) -> Expression:
        value, name, arguments = self.expression(node.node), node.name, self._arguments(node)

        def get(scope: Scope) -> bool:
            subject = value(scope)
            args, kwargs = arguments(scope)
            return apply_test(scope.meter, name, subject, args, kwargs)

        return get

    def get_CondExpr(self, node: nodes.CondExpr) -> Expression:
        test, value = self.expression(node.test), self.expression(node.expr1)
        if node.expr2 is None:
            none = Undefined("an inline if without an else was false")
            return lambda scope: value(scope) if test(scope) else none
        otherwise = self.expression(node.expr2)
        return lambda scope: value(scope) if test(scope) else otherwise(scope)

    def get_Compare(self, node: nodes.Compare) -> Expression:
        first = self.expression(node.expr)
        rest = [(operand.op, self.expression(operand.expr)) for operand in node.ops]

        def get(scope: Scope) -> bool:
            left = first(scope)
            for operator, value in rest:
                right = value(scope)
                if not compare(scope.meter, operator, left, right):
                    return False
                left = right
            return True

        return get

    def get_And(self, node: nodes.And) -> Expression:
        left, right = self.expression(node.left), self.expression(node.right)
        return lambda scope: left(scope) and right(scope)

    def get_Or(self, node: nodes.Or) -> Expression:
        left, right = self.expression(node.left), self.expression(node.right)
        return lambda scope: left(scope) or right(scope)

    def get_Not(self, node: nodes.Not) -> Expression:
        value = self.expression(node.node)
        return lambda scope: not value(scope)

    def get_Concat(self, node: nodes.Concat) -> Expression:
        values = self.expressions(node.nodes)
        return lambda scope: join(scope.meter, [to_text(scope.meter, value(scope)) for value in values])

    def get_Neg(self, node: "nodes.Neg | nodes.Pos") -> Expression:
        value, sign = self.expression(node.node), -1 if isinstance(node, nodes.Neg) else 1

        def get(scope: Scope) -> Any:
            number = value(scope)
            if not isinstance(number, (int, float)):
                if isinstance(number, Undefined):
                    raise number.fail()
                raise TypeError(f"bad operand type for unary -: {kind(number)!r}")
            return given(sign * number) if is_given(number) else sign * number

        return get

    get_Pos = get_Neg

    def get_Add(self, node: nodes.BinExpr) -> Expression:
        left, right, operator = self.expression(node.left), self.expression(node.right), node.operator
        return lambda scope: arithmetic(scope.meter, operator, left(scope), right(scope))

    get_Sub = get_Mul = get_Div = get_FloorDiv = get_Pow = get_Add

    def get_Mod(self, node: nodes.Mod) -> Expression:
        left, right = self.expression(node.left), self.expression(node.right)
        return lambda scope: remainder(scope.meter, left(scope), right(scope))


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
