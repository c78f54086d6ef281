"""Pictures of numbers: small multiples in one SVG file, for runs, lessons and the README.

    from data.chart import Bar, Line, Panel, chart
    curve = Line("best of N", [1, 2, 4, 8], [0.66, 0.71, 0.76, 0.79])
    svg = chart([Panel("Best of N", "N (log scale)", "gold", [curve], scale="log")])

No library, no outside resource; light or dark as its reader's screen is.
"""
import html
import math
from typing import NamedTuple

import numpy as np


class Line(NamedTuple):
    name: str                 # stands at its end
    xs: list                  # one place alone is a dot
    ys: list
    low: list = ()            # an interval around it, such as one over seeds
    high: list = ()
    faint: bool = False       # thin and pale: what stands behind a mean


class Bar(NamedTuple):
    name: str
    values: dict              # {"before": 0.66, "after": 0.78}
    halves: dict = {}         # half of the interval of each

    def interval(self, name):
        half = self.halves.get(name, math.nan)
        return self.values[name] - half, self.values[name] + half


class Panel(NamedTuple):
    title: str
    x: str = ""               # what the axes are, with units
    y: str = ""
    lines: list = ()
    bars: list = ()           # instead of lines
    scale: str = "linear"     # of x; "log", or "root" where most is close to 0
    limits: tuple = None      # least and most of y, or of the bars; otherwise what the data need


# Everything has the colour of its class. A picture has its own paper, so it is readable anywhere.
STYLE = """<style>
svg{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;color:#1f2328}
text,circle{fill:currentColor} .title{font-size:14px;font-weight:600}
path{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
path.thin,path.faint,path.grid{stroke-width:1} path.faint{opacity:.4} path.grid{opacity:.15}
path.bar{stroke-width:7;opacity:.45} path.band{fill:currentColor;stroke:none;opacity:.18}
.paper{fill:#fff} .soft{color:#656d76} .c0{color:#0b62c4} .c1{color:#b8500a} .c2{color:#1a7f45}
.c3{color:#8b3fb5} .c4{color:#b3261e} .c5{color:#0f7780}
@media (prefers-color-scheme:dark){
svg{color:#e6edf3} .paper{fill:#0d1117} .soft{color:#9198a1} .c0{color:#58a6ff} .c1{color:#f0883e}
.c2{color:#4cc26a} .c3{color:#c58af9} .c4{color:#ff7b72} .c5{color:#3cc4d0}}
</style>"""


def chart(panels, width=760, columns=2, height=250):
    """Panels from left to right, and row by row. -> SVG"""
    columns = max(1, min(columns, len(panels)))
    names = []
    for panel in panels:
        names += names_of(panel)
    colours = {"": "c0", "before": "soft", "after": "c0"}       # a name has one colour everywhere
    taken = 1 if "after" in names else 0
    for name in dict.fromkeys(names):
        if name not in colours:
            colours[name] = f"c{taken % 6}"
            taken += 1
    paper = Paper()
    top = 0
    for start in range(0, len(panels), columns):
        row = panels[start:start + columns]
        row_height = max(height, *(bars_height(panel) for panel in row))
        for i, panel in enumerate(row):
            left = width / columns * i + 16
            bottom = top + (row_height if panel.bars else height)
            box = Box(left, top, left + width / columns - 32, bottom)
            draw_panel(paper, panel, box, colours)
        top += row_height
    title = html.escape(", ".join(panel.title for panel in panels))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" role="img">'
    background = '<rect class="paper" width="100%" height="100%"/>'
    return "\n".join([head, f"<title>{title}</title>", STYLE, background, *paper.marks, "</svg>\n"])


def names_of(panel):
    names = [line.name for line in panel.lines]
    for bar in panel.bars:
        names += bar.values
    return names


def bars_height(panel):
    return 102 + sum(max(20, 4 + 8 * len(bar.values)) for bar in panel.bars)


class Paper:
    """SVG elements, one after the other."""

    def __init__(self):
        self.marks = []

    def path(self, places, style, end=""):
        """Through all (x, y), with a gap where a number is missing."""
        path = ""
        pen = "M"
        for x, y in places:
            if math.isfinite(x + y):
                path += f"{pen}{x:.1f} {y:.1f}"
                pen = "L"
            else:
                pen = "M"
        if path:
            self.marks.append(f'<path class="{style}" d="{path}{end}"/>')

    def dot(self, x, y, style, radius):
        if math.isfinite(x + y):
            self.marks.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')

    def text(self, x, y, text, style, anchor="start", room=math.inf):
        size = 15 if style == "title" else 12                   # bold letters are wider
        small = ""
        if wide(text, size) > room:
            small = f' style="font-size:{12 * room / wide(text, size):.1f}px"'
        if text:
            where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{small}'
            self.marks.append(f'<text class="{style}" {where}>{html.escape(text)}</text>')


def wide(text, size=12):
    """How wide a text is at most, whatever the font."""
    return 0.62 * size * len(text)


def root(value):
    return math.sqrt(max(value, 0.0))


def square(value):
    return value * value


SCALES = {"linear": (float, float), "root": (root, square), "log": (math.log, math.exp)}


class Axis:
    """Numbers from low to high, and their places on the paper, from start to end."""

    def __init__(self, numbers, start, end, scale="linear", limits=None):
        self.numbers = sorted({number for number in numbers if math.isfinite(number)}) or [0.0]
        self.start, self.end = start, end
        self.scale = scale
        self.low, self.high = limits or (self.numbers[0], self.numbers[-1])
        if scale == "root":
            self.low = 0.0
        if self.low == self.high:
            self.high += 1.0
        if scale == "linear" and limits is None:
            air = 0.03 * (self.high - self.low)
            self.low -= air
            self.high += air

    def at(self, number):
        bend = SCALES[self.scale][0]
        low = bend(self.low)
        share = (bend(number) - low) / (bend(self.high) - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self):
        """At most seven round numbers."""
        if self.scale == "linear":
            step = round_step(self.high - self.low)
            if all(float(number).is_integer() for number in self.numbers):
                step = max(step, 1.0)
            first = math.ceil(self.low / step)
            ticks = [step * i for i in range(first, first + 8)]
        elif self.scale == "log" and len(self.numbers) <= 8:
            ticks = self.numbers
        else:
            bend, unbend = SCALES[self.scale]
            even = np.linspace(bend(self.low), bend(self.high), 6)
            ticks = sorted({float(f"{unbend(place):.1g}") for place in even})   # of one digit
        return [tick for tick in ticks if self.low <= tick <= self.high]


def round_step(span):
    """1, 2 or 5 times a power of ten: about a sixth of the span."""
    step = 10.0 ** math.floor(math.log10(span / 6))
    for factor in (1, 2, 5):
        if factor * step >= span / 6:
            return factor * step
    return 10 * step


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other):
        beside = self.right <= other.left or other.right <= self.left
        return not beside and self.top < other.bottom and other.top < self.bottom

    def is_within(self, other):
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


class End(NamedTuple):
    y: float                  # first, to sort them from the top
    x: float
    name: str


def draw_panel(paper, panel, box, colours):
    room = box.right - box.left
    paper.text(box.left, box.top + 24, panel.title, "title", room=room)
    paper.text(box.left, box.top + 42, panel.y, "soft", room=room)
    paper.text(box.right, box.bottom - 10, panel.x, "soft", "end", room)
    inside = Box(box.left, box.top + 56, box.right, box.bottom - 46)
    if panel.bars:
        draw_bars(paper, panel, inside, colours)
    else:
        draw_lines(paper, panel, inside, colours)


def draw_lines(paper, panel, box, colours):
    x_axis, y_axis = draw_axes(paper, panel, box)
    ends = []
    taken = []                # where no name can stand
    for line in panel.lines:
        colour = colours[line.name]
        places = places_of(line.xs, line.ys, x_axis, y_axis)
        above = places_of(line.xs, line.high, x_axis, y_axis)
        below = places_of(line.xs, line.low, x_axis, y_axis)
        if len(places) == 1:
            paper.path(above + below, colour + " thin")
            paper.dot(*places[0], colour, 5)
        else:
            paper.path(above + below[::-1], colour + " band", "Z")
            paper.path(places, colour + (" faint" if line.faint else ""))
        for x, y in places + above + below:
            taken.append(Box(x - 5, y - 5, x + 5, y + 5))
        if 1 < len(places) <= 12:
            for x, y in places:
                paper.dot(x, y, colour, 3)
        known = [place for place in places if math.isfinite(sum(place))]
        if line.name and known and not line.faint:
            x, y = known[-1]
            ends.append(End(y, x, line.name))
    write_names(paper, ends, taken, box, x_axis.end, colours)


def draw_axes(paper, panel, box):
    names_room = max(wide(line.name) for line in panel.lines)
    xs = [x for line in panel.lines for x in line.xs]
    ys = [y for line in panel.lines for y in (*line.ys, *line.low, *line.high)]
    x_axis = Axis(xs, box.left + 42, box.right - names_room - 4, panel.scale)
    y_axis = Axis(ys, box.bottom, box.top, limits=panel.limits)
    for y in y_axis.ticks():
        height = y_axis.at(y)
        paper.path([(x_axis.start, height), (x_axis.end, height)], "grid")
        paper.text(box.left + 36, height + 4, f"{y:,.6g}", "soft", "end", room=44)
    x_ticks(paper, x_axis, box.bottom, box.bottom + 5, "soft thin")
    return x_axis, y_axis


def places_of(xs, ys, x_axis, y_axis):
    return [(x_axis.at(x), y_axis.at(y)) for x, y in zip(xs, ys)]


def write_names(paper, ends, taken, box, edge, colours):
    """Those that end at the right edge stand there in a column, the others where there is room."""
    column = [end for end in sorted(ends) if end.x > edge - 20]
    heights = spread([end.y for end in column], box.bottom + 8)
    for end, y in zip(column, heights):
        colour = colours[end.name]
        if abs(y - end.y) > 3:
            paper.path([(end.x + 4, end.y), (end.x + 9, y)], colour + " thin")
        paper.text(end.x + 11, y + 4, end.name, colour)
        taken.append(text_box(end.x + 11, y, end.name, "start"))
    room = Box(box.left + 42, box.top - 12, box.right + 12, box.bottom)
    for end in sorted(ends):
        if end not in column:
            paper.dot(end.x, end.y, colours[end.name], 3)
            x, y, anchor = free_place(end, room, taken)
            paper.text(x, y + 4, end.name, colours[end.name], anchor)
            taken.append(text_box(x, y, end.name, anchor))


def spread(heights, most):
    """Heights from small to large -> close to them, a line of text apart, and at most `most`."""
    apart = []
    for height in heights:
        if apart:
            height = max(height, apart[-1] + 14)
        apart.append(height)
    for i in reversed(range(len(apart))):           # what fell out below pushes the others up
        apart[i] = min(apart[i], most)
        most = apart[i] - 14
    return apart


def free_place(end, room, taken):
    """The closest place beside, above or below a line's end where its name covers nothing."""
    for far in range(0, 120, 8):
        for x, gap, anchor in ((8, 0, "start"), (-8, 0, "end"), (0, 14, "middle")):
            for y in (end.y + gap + far, end.y - gap - far):
                place = text_box(end.x + x, y, end.name, anchor)
                if place.is_within(room) and not any(map(place.overlaps, taken)):
                    return end.x + x, y, anchor
    return end.x + 8, end.y, "start"


def text_box(x, y, text, anchor):
    left = {"start": x, "middle": x - wide(text) / 2, "end": x - wide(text)}[anchor]
    return Box(left, y - 7, left + wide(text), y + 7)


def draw_bars(paper, panel, box, colours):
    """A row for each name; in it a bar, and its interval, for each value."""
    numbers = [0.0]
    for bar in panel.bars:
        numbers += bar.values.values()
        for name in bar.values:
            numbers += bar.interval(name)
    names_room = min((box.right - box.left) / 2, max(wide(bar.name) for bar in panel.bars))
    axis = Axis(numbers, box.left + names_room + 12, box.right - 8, limits=panel.limits)
    x_ticks(paper, axis, box.bottom, box.top - 4, "grid")
    x = box.left
    for name in dict.fromkeys(names_of(panel)):                 # what the colours mean
        paper.text(x, box.top - 14, name, colours[name])
        x += wide(name) + 12
    row = (box.bottom - box.top) / len(panel.bars)
    for i, bar in enumerate(panel.bars):
        middle = box.top + row * (i + 0.5)
        paper.text(box.left + names_room, middle + 4, bar.name, "", "end", names_room)
        y = middle - 4 * (len(bar.values) - 1)
        for name, number in bar.values.items():
            low, high = bar.interval(name)
            paper.path([(axis.at(0.0), y), (axis.at(number), y)], colours[name] + " bar")
            paper.path([(axis.at(low), y), (axis.at(high), y)], colours[name])
            y += 8


def x_ticks(paper, axis, bottom, end, style):
    """Numbers below an axis, as many as do not touch, each with a line from `bottom` to `end`."""
    free = -math.inf
    for x in axis.ticks():
        place = axis.at(x)
        text = f"{x:,.6g}"
        if place - wide(text) / 2 > free:
            paper.path([(place, bottom), (place, end)], style)
            paper.text(place, bottom + 18, text, "soft", "middle")
            free = place + wide(text) / 2 + 8
