// The wall of thumbnails: only the cells in view are in the document, however many images there are.

const GAP = 6, MARGIN = 12, TITLE = 40; // pixels
const CHUNK = 200; // rows that are asked for at once
const CHUNKS = 200; // of them that are kept
const TALLEST = 8e6; // pixels that browsers scroll exactly; a taller wall is scrolled in proportion

export class Wall {
  // rows(by, start, count) gives a promise of rows; open(row) is called for the one that is chosen
  constructor(element, space, { rows, open, picture }) {
    Object.assign(this, { element, space, askRows: rows, open, picture });
    this.cells = new Map();
    this.titles = new Map();
    this.chunks = new Map();
    this.active = 0;
    element.addEventListener("scroll", () => this.draw());
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("click", (event) => {
      const cell = event.target.closest(".cell");
      if (cell) this.choose(Number(cell.dataset.index));
    });
    new ResizeObserver(() => this.layout()).observe(element);
  }

  show(grouping) {
    this.grouping = grouping;
    this.starts = [0];
    for (const group of grouping.groups) this.starts.push(this.starts.at(-1) + group.count);
    this.count = this.starts.at(-1);
    this.chunks.clear();
    this.clear();
    this.active = 0;
    this.opened = undefined; // of the order before
    this.element.scrollTop = 0;
    this.layout();
  }

  clear() {
    for (const cell of this.cells.values()) this.drop(cell);
    for (const title of this.titles.values()) title.remove();
    this.cells.clear();
    this.titles.clear();
  }

  drop(cell) {
    cell.querySelector("img")?.removeAttribute("src"); // what is still loading is not needed now
    cell.remove();
  }

  layout() {
    const width = this.element.clientWidth - 2 * MARGIN;
    if (!this.grouping || width <= 0) return;
    const first = this.tops ? this.firstInView() : 0;
    this.columns = Math.max(3, Math.floor((width + GAP) / (112 + GAP)));
    this.side = Math.floor((width - (this.columns - 1) * GAP) / this.columns);
    this.title = this.grouping.groups.length > 1 ? TITLE : MARGIN;
    this.tops = [0];
    for (const group of this.grouping.groups) {
      const lines = Math.ceil(group.count / this.columns);
      this.tops.push(this.tops.at(-1) + this.title + lines * (this.side + GAP));
    }
    this.height = this.tops.at(-1) + MARGIN;
    this.shown = Math.min(this.height, TALLEST);
    this.space.style.height = `${this.shown}px`;
    this.clear();
    if (first) this.scrollTo(this.placeOf(first).top - this.title);
    this.draw();
  }

  // ---- Places. A cell's top counts from the top of the whole wall.

  view() {
    const height = this.element.clientHeight;
    const scale = this.shown > height ? (this.height - height) / (this.shown - height) : 1;
    return { top: this.element.scrollTop * scale, height, scale };
  }

  scrollTo(top) {
    const { scale } = this.view();
    this.element.scrollTop = Math.max(0, top) / scale;
  }

  groupOf(index) {
    return lastAtMost(this.starts, index);
  }

  placeOf(index) {
    const group = this.groupOf(index);
    const within = index - this.starts[group];
    const line = Math.floor(within / this.columns), column = within % this.columns;
    const top = this.tops[group] + this.title + line * (this.side + GAP);
    return { group, line, column, top, left: MARGIN + column * (this.side + GAP) };
  }

  firstInView() {
    return this.indexAt(this.view().top + this.title);
  }

  indexAt(top) {
    const group = Math.min(lastAtMost(this.tops, top), this.grouping.groups.length - 1);
    const line = Math.max(0, Math.floor((top - this.tops[group] - this.title) / (this.side + GAP)));
    return Math.min(this.starts[group] + line * this.columns, this.starts[group + 1] - 1);
  }

  // ---- Drawing.

  draw() {
    if (!this.tops || !this.count) return;
    const { top, height } = this.view();
    const from = top - this.side, to = top + height + this.side;
    const offset = this.element.scrollTop - top;
    const cells = new Set(), titles = new Set();
    let group = Math.max(0, Math.min(lastAtMost(this.tops, from), this.grouping.groups.length - 1));
    for (; group < this.grouping.groups.length && this.tops[group] < to; group++) {
      if (this.grouping.groups.length > 1) titles.add(this.drawTitle(group, offset));
      let index = Math.max(this.starts[group], this.indexIn(group, from));
      for (; index < this.starts[group + 1]; index++) {
        const place = this.placeOf(index);
        if (place.top > to) break;
        cells.add(this.drawCell(index, place, offset));
      }
    }
    for (const [key, title] of this.titles) if (!titles.has(key)) title.remove(), this.titles.delete(key);
    for (const [key, cell] of this.cells) if (!cells.has(key)) this.drop(cell), this.cells.delete(key);
    this.mark();
  }

  indexIn(group, top) {
    const line = Math.floor((top - this.tops[group] - this.title) / (this.side + GAP));
    return this.starts[group] + Math.max(0, line) * this.columns;
  }

  drawTitle(group, offset) {
    let title = this.titles.get(group);
    if (!title) {
      title = document.createElement("div");
      title.className = "group-name";
      title.setAttribute("role", "presentation");
      const name = document.createElement("b"), count = document.createElement("span");
      name.textContent = this.grouping.groups[group].name;
      count.textContent = this.grouping.groups[group].count.toLocaleString("en");
      title.append(name, count);
      this.titles.set(group, title);
      this.space.append(title);
    }
    title.style.top = `${this.tops[group] + offset}px`;
    return group;
  }

  drawCell(index, place, offset) {
    let cell = this.cells.get(index);
    if (!cell) {
      cell = document.createElement("div");
      cell.className = "cell";
      cell.id = `cell-${index}`;
      cell.dataset.index = index;
      cell.setAttribute("role", "option");
      cell.setAttribute("aria-setsize", this.count);
      cell.setAttribute("aria-posinset", index + 1);
      cell.style.width = cell.style.height = `${this.side}px`;
      this.cells.set(index, cell);
      this.space.append(cell);
      this.fill(cell, index);
    }
    cell.style.left = `${place.left}px`;
    cell.style.top = `${place.top + offset}px`;
    return index;
  }

  async fill(cell, index) {
    const row = await this.row(index);
    if (row && cell.isConnected) cell.append(this.picture(row, this.side));
  }

  async row(index) {
    const number = Math.floor(index / CHUNK), key = this.grouping.name;
    let chunk = this.chunks.get(number);
    if (!chunk) {
      const start = number * CHUNK;
      chunk = this.askRows(key, start, Math.min(CHUNK, this.count - start));
      this.chunks.set(number, chunk);
      if (this.chunks.size > CHUNKS) this.chunks.delete(this.chunks.keys().next().value);
      chunk.catch(() => this.chunks.delete(number)); // it was said already; asked again when seen
    }
    try {
      const rows = await chunk;
      return key === this.grouping.name ? rows[index % CHUNK] : undefined;
    } catch {
      return undefined;
    }
  }

  // ---- One of the cells is active, for the keyboard; one may be open.

  mark() {
    for (const [index, cell] of this.cells) {
      cell.classList.toggle("active", index === this.active);
      cell.classList.toggle("open", index === this.opened);
      cell.setAttribute("aria-selected", index === this.opened);
    }
    const there = this.cells.has(this.active);
    if (there) this.element.setAttribute("aria-activedescendant", `cell-${this.active}`);
    else this.element.removeAttribute("aria-activedescendant");
  }

  async choose(index) {
    this.active = this.opened = index;
    this.mark();
    const row = await this.row(index);
    if (row) this.open(row);
  }

  closed() {
    this.opened = undefined;
    this.mark();
    this.element.focus({ preventScroll: true });
  }

  go(index) {
    this.active = Math.max(0, Math.min(this.count - 1, index));
    const place = this.placeOf(this.active), { top, height } = this.view();
    const above = place.line === 0 ? place.top - this.title : place.top - GAP;
    if (above < top) this.scrollTo(above);
    else if (place.top + this.side + GAP > top + height) this.scrollTo(place.top + this.side + GAP - height);
    this.draw();
  }

  toGroup(group) {
    this.active = this.starts[group];
    this.scrollTo(this.tops[group]);
    this.draw();
  }

  key(event) {
    if (!this.count || event.altKey || event.ctrlKey || event.metaKey) return;
    const lines = Math.max(1, Math.floor(this.element.clientHeight / (this.side + GAP)) - 1);
    const moves = {
      ArrowLeft: () => this.active - 1,
      ArrowRight: () => this.active + 1,
      ArrowUp: () => this.lines(-1),
      ArrowDown: () => this.lines(1),
      PageUp: () => this.lines(-lines),
      PageDown: () => this.lines(lines),
      Home: () => 0,
      End: () => this.count - 1,
    };
    if (event.key in moves) this.go(moves[event.key]());
    else if (event.key === "Enter" || event.key === " ") this.choose(this.active);
    else return;
    event.preventDefault();
  }

  // The cell so many lines below the active one, in its column where the line is long enough.
  lines(by) {
    let { group, line, column } = this.placeOf(this.active);
    const linesOf = (g) => Math.ceil(this.grouping.groups[g].count / this.columns);
    for (let left = Math.abs(by); left; left--) {
      if (by > 0 && line + 1 < linesOf(group)) line++;
      else if (by > 0 && group + 1 < this.grouping.groups.length) group++, line = 0;
      else if (by < 0 && line > 0) line--;
      else if (by < 0 && group > 0) group--, line = linesOf(group) - 1;
    }
    const last = this.grouping.groups[group].count - 1;
    return this.starts[group] + Math.min(line * this.columns + column, last);
  }
}

// The last place of an ascending list whose value is at most this.
function lastAtMost(values, value) {
  let low = 0, high = values.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (values[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}
