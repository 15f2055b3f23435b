"""Repairs that change how much of something counts: a term of a sum that every rank of a reduction adds, what one line of the loss comes to,
the weight of each microbatch's or rank's loss (not trusted: each is tried)."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from fractions import Fraction

import msgspec

from trainverify.diagnose.candidate import Candidate
from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.edit import Edit, copied, scaled
from trainverify.diagnose.places import Places, result
from trainverify.diagnose.relation import Relation
from trainverify.diagnose.words import ranks_text
from trainverify.ir.trace import OpCall, TensorRef
from trainverify.replay.memory import is_float

ADDEND = {"aten.add.Tensor": "alpha", "aten.add_.Tensor": "alpha", "aten.sub.Tensor": "alpha", "aten.addmm.default": "beta", "aten.baddbmm.default": "beta"}
BIASED = ("aten.addmm.default", "aten.baddbmm.default")
MULTIPLIES = ("aten.div.Tensor", "aten.mul.Tensor", "aten.clone.default")
_FIRST, _LAST, _BACKWARD = "first", "last", "backward"       # where a loss is weighed
NEAREST = 3                                   # lines of each sort that are tried
# What a share stays a share under.
LINEAR = {"add", "add_", "sub", "sub_", "rsub", "neg", "mul", "mul_", "div", "div_", "sum", "mean", "copy_", "clone", "_to_copy", "cat", "stack", "view", "_unsafe_view",
          "reshape", "slice", "select", "index", "index_select", "constant_pad_nd", "native_dropout", "split_with_sizes_copy", "split_copy", "_foreach_add", "_foreach_copy_"}
MOST_READERS = 40


class Amounts:
    def __init__(self, flow: Dataflow, places: Places):
        self.flow, self.places = flow, places

    # ---- one term
    def addends(self, nodes: Iterable[Node]) -> Iterator[Candidate]:
        """A term of a sum that is reduced afterwards, counted once instead of once by every rank; or not at all."""
        for node in self._lines(nodes, lambda call: call.name in ADDEND and not self._is_hook(call)):
            call, line = self.flow.call(node), self._words(node)
            what = "the bias" if call.name in BIASED else "what is added"
            for factor in (*(Fraction(1, n) for n in self._reduced_over(node)), Fraction(0)):
                too_many = f"{1 / factor - 1} x {what} at {line}, which each of {1 / factor} ranks adds" if factor else f"{what} at {line}"
                means = Relation("additive term", "REL014", f"parallel = reference + {too_many}", detail=f"a term too many: {too_many}")
                words = f"count {what} at {line} {factor} times: {1 / factor} ranks add it to their shares" if factor else f"leave out {what} at {line}"
                yield Candidate(words, self._weighed(node, factor), means, node)

    def _reduced_over(self, node: Node) -> list[int]:
        """Over how many ranks what a call makes is summed, as it is or moved, added to and scaled: the sizes of the groups."""
        sizes, seen, todo = set(), {node}, [node]
        while todo and len(seen) < MOST_READERS:
            n = todo.pop(0)
            c = self.flow.call(n).collective
            if c is not None and c.reduce_op in ("sum", "avg"):
                sizes.add(len(c.group))
            elif n == node or c is None and self.flow.call(n).name.split(".")[1] in LINEAR:
                new = [r for r in self.flow.readers(n) if r not in seen]
                seen.update(new)
                todo += new
        return sorted(sizes - {1})

    def _weighed(self, node: Node, factor: Fraction) -> Edit:
        edit = Edit()
        for n in (n for o in self.places.occurrences([node], False) for n in o.values()):
            call = self.flow.call(n)
            name = ADDEND[call.name]
            if isinstance(call.args[0 if name == "beta" else 1], TensorRef):
                edit.calls[n] = msgspec.structs.replace(call, kwargs={**call.kwargs, name: float(call.kwargs.get(name, 1) * factor)})
        return edit

    def _is_hook(self, call: OpCall) -> bool:
        return call.name == "aten.add_.Tensor" and len(call.args) > 1 and not isinstance(call.args[1], TensorRef)

    # ---- a sum of what is whole
    def reductions(self, nodes: list[Node]) -> Iterator[Candidate]:
        """Without one of the nearest all-reduces: what it sums is whole already, or is summed again later."""
        start = min(nodes, key=lambda n: (n[1], n[0]), default=None)
        if start is None:
            return
        lines: dict[tuple, Node] = {}
        for call in sorted(self.flow.calls[start[0]], key=lambda c: abs(c.index - start[1])):
            line, c = self.places.line((start[0], call.index)), call.collective
            if c is not None and c.kind == "all_reduce" and c.reduce_op == "sum" and line is not None and line[3] != "setup" and result(call) is not None and is_float(result(call).dtype):
                lines.setdefault(line, (start[0], call.index))
        for node in list(lines.values())[:NEAREST]:
            c, line, edit = self.flow.call(node).collective, self._words(node), Edit()
            for n in (n for o in self.places.occurrences([node], False) for n in o.values()):
                d = self.flow.call(n).collective
                if len(d.inputs) == 1:
                    edit.calls[n] = copied(self.flow.call(n))
            n = len(c.group)
            means = Relation("additive term", "REL014", f"parallel = reference + {n - 1} x what the {n} ranks of the all_reduce at {line} have already",
                             detail=f"a term too many: what is reduced at {line} is whole without it, or is reduced again")
            yield Candidate(f"remove the all_reduce at {line}", edit, means, node)

    # ---- weights of losses
    def losses(self, ratio: tuple[tuple[tuple[int, int], Fraction], ...]) -> Iterator[Candidate]:
        """Each loss, where its backward begins, by how much more the reference counts it: the k-th of a rank in every step by that of (rank, k)."""
        weights: dict[int, dict[int, Fraction]] = defaultdict(dict)
        for (rank, number), factor in ratio:
            weights[rank][number] = factor
        seeds = self._seeds()
        for how in (_FIRST, _LAST, _BACKWARD):
            edit, told, line = Edit(), {}, ""
            for (rank, _), its in seeds.items():
                if len(its) != len(weights[rank]):
                    continue
                told.setdefault(tuple(weights[rank][k] for k in sorted(weights[rank])), set()).add(rank)
                for seed, factor in zip(its, [weights[rank][k] for k in sorted(weights[rank])]):
                    self._weigh(edit, seed, factor, how)
                    line = line or self._words(seed)
            words = "; ".join(f"by {', '.join(map(str, factors))}" + (f" on {ranks_text(sorted(ranks))}" if len(told) > 1 else "") for factors, ranks in list(told.items())[:3])
            more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
            yield Candidate(f"scale the losses {'(in their backward alone) ' if how == _BACKWARD else ''}at {line} {words}{more}", edit)

    def _weigh(self, edit: Edit, seed: Node, factor: Fraction, how: str) -> None:
        call = self.flow.call(seed)
        edit.after[self.places.settled(seed)] += scaled(result(call), factor, call.span)
        loss = self._loss(seed, how == _FIRST) if how != _BACKWARD else None
        if loss is not None:
            edit.after[self.places.settled(loss[0])] += scaled(loss[1], factor, call.span)

    def _loss(self, seed: Node, first: bool) -> tuple[Node, TensorRef] | None:
        """The value whose backward begins here, and the call that made it; first: what it was before numbers multiplied it (which is what is
        reported, often)."""
        ref, at, found = self.flow.call(seed).args[0], seed[1], None
        while isinstance(ref, TensorRef) and ref.numel == 1 and (made := self.flow.writer(seed[0], ref, at)[:1]):
            found, call = (made[0], ref), self.flow.call(made[0])
            if not first or call.name not in MULTIPLIES or any(isinstance(a, TensorRef) for a in call.args[1:]):
                break
            ref, at = call.args[0], made[0][1]
        return found

    def _seeds(self) -> dict[tuple[int, int], list[Node]]:
        """By rank and step: where a backward begins with ones like a loss."""
        out: dict[tuple[int, int], list[Node]] = defaultdict(list)
        for rank, ops in self.flow.calls.items():
            for call in ops:
                span = self.flow.span((rank, call.index))
                if call.name == "aten.ones_like.default" and isinstance(call.args[0], TensorRef) and call.args[0].numel == 1 and span is not None and span.phase != "backward" and span.step:
                    out[(rank, span.step)].append((rank, call.index))
        return out

    # ---- lines
    def _lines(self, nodes: Iterable[Node], wanted) -> list[Node]:
        """The nearest calls above some calls that are wanted, one of each line."""
        out: dict[tuple, Node] = {}
        for node in self.places.above(nodes):
            line = self.places.line(node)
            if line is not None and line[3] != "setup" and line not in out and wanted(self.flow.call(node)):
                out[line] = node
                if len(out) == NEAREST:
                    break
        return list(out.values())

    def _words(self, node: Node) -> str:
        return f"{self.flow.span(node)}{self.places.called(node)}"
