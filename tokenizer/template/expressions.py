"""Expressions of a template as closures: each takes a `Scope` and gives a value."""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError

from octo_run.tokenizer.template.filters import apply_filter, apply_test, remainder
from octo_run.tokenizer.template.format import to_text
from octo_run.tokenizer.template.methods import attribute, item
from octo_run.tokenizer.template.text import INTEGER_BITS, Meter, join, written
from octo_run.tokenizer.template.values import (
    Undefined,
    arithmetic,
    call,
    compare,
    given,
    is_given,
    iterate,
    key,
    kind,
)

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


class Expressions:
    """Makes the closures. ``weight``: nodes of the present block so far, the price of running it once."""

    def __init__(self) -> None:
        self.weight = 0
        self.total = 0

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
