"""Mutants: small changes that no human chose. Do the tests notice them?

bugs.py plants mistakes that somebody thought of, and so did whoever wrote the tests. Here a rule
finds a place and makes the change: a minus for a plus, a 0 for a 1, a statement less. If all tests
stay green, the mutant survives. Then either a test is missing, or the line says nothing.

    python -m lessons.mutants 30                      30 mutants of the scripts, model.py and data/
    python -m lessons.mutants 30 ppo.py data/rows.py  of these files alone
    python -m lessons.mutants 30 --seed 1 --jobs 1    others, one at a time (at most two)

The rules, with an example each:

    statement    optimizer.zero_grad()        pass
    condition    if long:                     if not (long):
    comparison   before < top_p               before >= top_p, or before <= top_p
    sign         V - R                        V + R, and -x for x
    operands     chosen - rejected            rejected - chosen
    arguments    policy_loss(logps, old)      policy_loss(old, logps)
    names        r_chosen, r_rejected = ..    r_rejected where r_chosen stood
    constant     1                            0
    function     x.mean(1)                    x.sum(1)
    axis         x.mean(1)                    x.mean()
    dropped      z.detach()                   z, and ~answer, answer & words, hidden(ids, mask)

Lines are drawn by lot, each as likely as any other, then one of the rules that fit the line, then
one of its places. Docstrings, comments, annotations and what is printed are left alone. Where the
tests take more than a minute and five times what they take without the change, it hangs, and counts
as killed. What survives by right (the name of a thing, a second guard) is for you to tell: read its
line.
"""
import argparse
import ast
import difflib
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from data.exam import half_width
from lessons import bugs

SCRIPTS = ("model.py", "sft.py", "reward_model.py", "ppo.py", "grpo.py", "dpo.py", "cai.py")
MESSAGES = {"say", "print", "error", "add_argument", "add_argument_group", "Parser", "UserError",
            "Diverged"}
OTHERS = {"<": (">=", "<="), "<=": (">", "<"), ">": ("<=", ">="), ">=": ("<", ">"), "==": ("!=",),
          "!=": ("==",), "is not": ("is",), "not in": ("in",), "is": ("is not",),
          "in": ("not in",), "+": ("-",), "-": ("+",), "*": ("/",), "/": ("*",), "//": ("/",),
          "**": ("*",), "and": ("or",), "or": ("and",)}
FUNCTIONS = {"sum": "mean", "mean": "sum", "min": "max", "max": "min", "minimum": "maximum",
             "maximum": "minimum", "any": "all", "all": "any", "argmax": "argmin",
             "softmax": "log_softmax", "log_softmax": "softmax", "amax": "amin", "amin": "amax"}
DROPPED = {"detach", "clone", "masked_fill", "clamp", "abs", "float", "exp", "log", "flip", "roll",
           "strip", "cumsum", "where"}
CONSTANTS = {"0": "1", "1": "0", "0.0": "1.0", "1.0": "0.0", "True": "False", "False": "True"}


class Change(NamedTuple):
    file: str
    line: int
    rule: str
    begin: int               # from this byte
    end: int                 # to the one before this
    new: bytes               # stands this


# ---------------------------------------------------------------- what can be changed

class Finder(ast.NodeVisitor):
    """Walks through a file's syntax tree and notes all changes that the rules allow."""

    def __init__(self, file):
        self.file = file
        self.code = (bugs.HERE / file).read_bytes()
        self.begins = [0]
        for line in self.code.splitlines(keepends=True):
            self.begins.append(self.begins[-1] + len(line))
        self.found = []          # list of Change
        self.twins = {}          # {name: one that is bound beside it}
        self.visit(ast.parse(self.code))

    def span(self, node):
        begin = self.begins[node.lineno - 1] + node.col_offset
        end = self.begins[node.end_lineno - 1] + node.end_col_offset
        return begin, end

    def source(self, node):
        begin, end = self.span(node)
        return self.code[begin:end]

    def note(self, node, rule, new, begin=None, end=None):
        first, last = self.span(node)
        begin = first if begin is None else begin
        end = last if end is None else end
        if new != self.code[begin:end]:
            self.found.append(Change(self.file, node.lineno, rule, begin, end, new))

    def note_operator(self, rule, left, right):
        """What stands between two operands, brackets included, with another operator in it."""
        begin = self.span(left)[1]
        end = self.span(right)[0]
        between = self.code[begin:end].decode()
        symbol = between.strip("() \n\\")
        for new in OTHERS.get(symbol, ()):
            self.note(left, rule, between.replace(symbol, new).encode(), begin, end)

    def note_swap(self, rule, a, b):
        between = self.code[self.span(a)[1]:self.span(b)[0]]
        if self.source(a) != self.source(b):
            new = self.source(b) + between + self.source(a)
            self.note(a, rule, new, end=self.span(b)[1])

    # ---- statements

    def generic_visit(self, node):
        is_deletable = isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break))
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if is_deletable or is_call and name_of(node.value.func) not in MESSAGES:
            self.note(node, "statement", b"pass")
        super().generic_visit(node)

    def visit_FunctionDef(self, node):
        outer = dict(self.twins)
        self.bind_together(node.args.args)
        for child in node.args.defaults + node.body:     # annotations are left alone
            self.visit(child)
        self.twins = outer

    def visit_Assign(self, node):
        (target,) = node.targets[:1]
        if isinstance(target, ast.Tuple):
            self.bind_together(target.elts)
        names = [name_of(child) for child in ast.walk(node.value)]
        is_part = isinstance(target, (ast.Attribute, ast.Subscript))
        is_again = isinstance(target, ast.Name) and target.id in names
        if is_part or is_again:  # else a name would be missing, as any test notices
            self.note(node, "statement", b"pass")
        self.visit(node.value)

    def visit_AnnAssign(self, node):
        pass                     # a field of a Config or of a record, and its default

    def visit_If(self, node):
        if b"__name__" not in self.source(node.test):
            self.negate(node.test)
            super().generic_visit(node)

    def visit_comprehension(self, node):
        for test in node.ifs:
            self.negate(test)
        super().generic_visit(node)

    def negate(self, test):
        if not isinstance(test, (ast.Compare, ast.UnaryOp)):    # these have rules of their own
            self.note(test, "condition", b"not (" + self.source(test) + b")")

    def bind_together(self, nodes):
        """Names in one signature, or in one unpacking, tend to have one type."""
        names = [getattr(node, "id", getattr(node, "arg", "_")) for node in nodes]
        names = [name for name in names if name not in ("_", "self", "config", "tokenizer")]
        if len(names) > 1:
            self.twins |= dict(zip(names, names[1:] + names[:1]))

    # ---- expressions

    def visit_Name(self, node):
        if node.id in self.twins and isinstance(node.ctx, ast.Load):
            self.note(node, "names", self.twins[node.id].encode())

    def visit_Constant(self, node):
        new = CONSTANTS.get(self.source(node).decode())
        if new:
            self.note(node, "constant", new.encode())

    def visit_JoinedStr(self, node):
        pass

    def visit_Compare(self, node):
        if len(node.ops) == 1:
            self.note_operator("comparison", node.left, node.comparators[0])
        super().generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:]):
            self.note_operator("condition", left, right)
        super().generic_visit(node)

    def visit_UnaryOp(self, node):
        operator = b"not" if isinstance(node.op, ast.Not) else self.source(node)[:1]
        rule = "sign" if operator == b"-" else "dropped"
        self.note(node, rule, self.source(node)[len(operator):].lstrip())
        super().generic_visit(node)

    def visit_BinOp(self, node):
        self.note_operator("sign", node.left, node.right)
        if isinstance(node.op, (ast.Sub, ast.Div)):
            self.note_swap("operands", node.left, node.right)
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            self.note(node, "dropped", b"(" + self.source(node.left) + b")")
            self.note(node, "dropped", b"(" + self.source(node.right) + b")")
        super().generic_visit(node)

    def visit_Call(self, node):
        name = name_of(node.func)
        if name in MESSAGES:
            return
        for a, b in zip(node.args, node.args[1:]):
            self.note_swap("arguments", a, b)
            if name_of(b) in ("mask", "answer") and b is node.args[-1]:
                self.note(b, "dropped", b"", self.span(a)[1], self.span(b)[1])
        begin, end = self.span(node.func)
        axis = [arg for arg in node.args if isinstance(arg, ast.Constant)]
        if name in FUNCTIONS:
            self.note(node.func, "function", FUNCTIONS[name].encode(), end - len(name))
            if axis and isinstance(node.func, ast.Attribute):
                self.note(node, "axis", self.code[begin:end] + b"()")
        if isinstance(node.func, ast.Attribute) and name in DROPPED:
            self.note(node, "dropped", self.code[begin:end - len(name) - 1])
        super().generic_visit(node)


def name_of(node):
    """f of f(x) and of a.b.f(x)"""
    return getattr(node, "attr", getattr(node, "id", ""))


def mutated(change):
    """The text of its file, or None if Python can't read it."""
    code = (bugs.HERE / change.file).read_bytes()
    code = code[:change.begin] + change.new + code[change.end:]
    try:
        compile(code, change.file, "exec")
    except SyntaxError:
        return None
    return code.decode()


def draw(files, count, seed):
    """`count` changes: each line has its turn before any has its second."""
    lines = {}
    for file in files:
        for change in dict.fromkeys(Finder(file).found):
            lines.setdefault((file, change.line), []).append(change)
    lots = random.Random(seed)
    turns = list(lines)
    drawn = []
    while any(lines.values()):
        lots.shuffle(turns)
        for turn in turns:
            change = draw_of_line(lines[turn], lots)
            if change is not None:
                drawn.append(change)
            if len(drawn) == count:
                return drawn
    return drawn


def draw_of_line(changes, lots):
    """Takes one out of the list; None where none can be read."""
    while changes:
        rules = sorted({change.rule for change in changes})
        rule = lots.choice(rules)
        of_rule = [change for change in changes if change.rule == rule]
        change = lots.choice(of_rule)
        changes.remove(change)
        if mutated(change) is not None:
            return change
    return None


# ---------------------------------------------------------------- do the tests notice?

def tests_of(file):
    """The tests that could see a change: as in bugs.py, and for data/ both of its large files of
    tests. A changed world writes other files than those in data/: the test for that comes first."""
    tests = bugs.tests_of(file)
    if file in bugs.WORLD:
        tests = ["data/test_world.py::test_the_files_are_what_the_generator_writes", *tests]
    if file.startswith("data/"):
        tests += ["data/test_data.py", "data/test_world.py"]
    return list(dict.fromkeys(tests))


def first_red(file, text, limit):
    """In a copy of the repository with this text in the file. -> the first red test, "hangs", or
    None where all are green"""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "copy")
        bugs.plant(0, folder)
        Path(folder, file).write_text(text, encoding="utf-8")
        status, output = bugs.run_tests(folder, tests_of(file), limit)
    if status == 0:
        return None
    last_line = output.strip().split("\n")[-1]
    return bugs.red_test(output) or last_line[:40]


def time_limits(files):
    """Without any change all tests must be green. -> {file: seconds that a mutant may take}"""
    limits = {}
    for file in files:
        tests = " ".join(tests_of(file))
        if tests not in limits:  # files of data/ share theirs
            started = time.time()
            red = first_red(file, (bugs.HERE / file).read_text(encoding="utf-8"), None)
            if red is not None:
                raise SystemExit(f"{file}: without any change this is red: {red}")
            seconds = time.time() - started
            limits[tests] = 60 + 5 * seconds
            print(f"{file}: its tests are green, in {seconds:.0f} s", flush=True)
        limits[file] = limits[tests]
    return limits


def show_survivor(change):
    print(f"\nSURVIVED {change.file}:{change.line}, {change.rule}")
    path = bugs.HERE / change.file
    before = path.read_text(encoding="utf-8").splitlines()
    after = mutated(change).splitlines()
    for line in difflib.unified_diff(before, after, lineterm="", n=0):
        if not line.startswith(("---", "+++", "@@")):
            print(f"    {line}")


def show_progress(change, reds, how_far):
    place = f"{change.file}:{change.line}"
    red = reds[change] or "SURVIVED"
    print(f"{how_far}  {place:22} {change.rule:11}{red}", flush=True)


def show_end(reds):
    for change in sorted(reds):
        if reds[change] is None:
            show_survivor(change)
    killed = [red is not None for red in reds.values()]
    hang = list(reds.values()).count("hangs")
    if killed:
        count = sum(killed)
        share = count / len(killed)
        print(f"\nkilled {count} of {len(killed)}, {hang} of them by time: "
              f"{share:.2f} +-{half_width(killed):.2f}")


def main(arguments):
    parser = argparse.ArgumentParser("python -m lessons.mutants", allow_abbrev=False)
    parser.add_argument("count", type=int, help="how many mutants")
    parser.add_argument("files", nargs="*", help="of which files (the scripts, model.py, data/)")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="at a time")
    flags = parser.parse_args(arguments)
    everything = [*SCRIPTS]
    for path in sorted((bugs.HERE / "data").glob("*.py")):
        if not path.name.startswith("test_"):
            everything.append(f"data/{path.name}")
    for file in flags.files:
        if file not in everything:
            parser.error(f"{file}: choose of {', '.join(everything)}")
    drawn = draw(flags.files or everything, flags.count, flags.seed)
    limits = time_limits(sorted({change.file for change in drawn}))
    started = time.time()
    reds = {}                    # {change: the test that noticed it}
    with ThreadPoolExecutor(flags.jobs) as pool:
        runs = {}
        for change in drawn:
            run = pool.submit(first_red, change.file, mutated(change), limits[change.file])
            runs[run] = change
        try:
            for run in as_completed(runs):
                change = runs[run]
                reds[change] = run.result()
                done = len(reds)
                each = (time.time() - started) / done
                left = each * (len(drawn) - done)
                show_progress(change, reds, f"{done:4} of {len(drawn)}, {left:5.0f} s left")
        except KeyboardInterrupt:           # what has been tried is shown all the same
            pool.shutdown(cancel_futures=True)
    show_end(reds)
    print(f"{time.time() - started:.0f} s, seed {flags.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
