"""Chat templates in jinja2's own sandbox, with a budget, and strings that know who wrote them.

jinja2 parses a template, compiles it and runs it. What chat templates need beyond that is kept here:

- **Who wrote a character.** Every string in a template is a `text.Text`, a ``str`` with a mask of what the template
  wrote. The code generator of `sandbox` makes the template's own texts and constants such, and puts output, ``~`` and
  blocks together by `text.joined`. A plain ``str`` (what Python's or jinja2's own functions return) is nobody's proof,
  so an operation that forgets the mask loses a proof and never makes one. The methods and filters that real templates
  use keep masks exactly; ``tojson``, lists as text, padding and ``%5s`` keep all or nothing.
- **A budget.** `budget.Meter` counts operations, bytes and computing time. Each round of a loop and each macro counts
  its nodes, each call, filter, operator and attribute goes through a method of the sandbox that counts, each `Text`
  counts when it is made; what makes more than it is given asks for room first. Before anything walks through lists in
  lists (printing, comparing, sorting, hashing), `text.Weight` walks through them, counted and to a limited depth.
- **Nothing of Python's inside.** The sandbox reads only the attributes listed in `sandbox.READABLE`, filters and
  globals are those listed, templates load no others. What is no data prints as the name of its kind, and not at all in
  lists. Recursion of macros ends in Python's own RecursionError.
- **A bounded compilation.** Characters, nodes, and branches times names have limits; no constant is computed.
"""
