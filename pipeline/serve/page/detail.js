// One image: itself, what the model sees in it, and its nearest neighbours.

const LOOKS = { attention: "Attention of the CLS token", components: "Principal components of patches" };

export class Detail {
  constructor(element, { api, picture, closed }) {
    Object.assign(this, { element, api, picture, closed });
    this.name = element.querySelector("#name");
    this.content = element.querySelector("#content");
    this.urls = [];
    this.turn = 0;
    element.querySelector("#close").addEventListener("click", () => this.close());
    element.addEventListener("keydown", (event) => this.key(event));
  }

  get isOpen() {
    return !this.element.hidden;
  }

  close() {
    if (!this.isOpen) return;
    this.turn++;
    this.element.hidden = true;
    this.content.replaceChildren();
    this.forget();
    this.closed();
  }

  forget() {
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
  }

  // An image of the set.
  async row(row) {
    this.forget();
    const turn = this.start(nameOf(row), this.picture(row, 512, "large"));
    this.facts(row);
    this.looks((what) => `/look/${what}/${encodeURIComponent(row.image_id)}`);
    await this.neighbours(turn, () => this.api.search({ image_id: row.image_id, k: 24 }));
  }

  // A file of the user's.
  async file(file) {
    this.forget();
    const image = document.createElement("img");
    image.className = "large";
    image.alt = file.name;
    image.src = this.url(file);
    image.addEventListener("error", () => image.remove()); // a format that browsers do not show
    const turn = this.start(file.name || "your image", image);
    const here = await this.neighbours(turn, () => this.api.searchFile(file, 24));
    if (here) this.looks((what) => this.api.lookFile(what, file).then((blob) => this.url(blob)), here);
  }

  url(blob) {
    const url = URL.createObjectURL(blob);
    this.urls.push(url);
    return url;
  }

  start(name, image) {
    this.name.textContent = name;
    this.content.replaceChildren(image);
    this.element.hidden = false;
    this.element.scrollTop = 0;
    this.name.focus({ preventScroll: true });
    return ++this.turn;
  }

  facts(row) {
    const list = document.createElement("dl");
    for (const [name, text] of [["source", row.source], ["label", row.label], ["decision", row.decision], ["id", row.image_id]]) {
      if (!text) continue;
      const term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = name;
      value.textContent = text;
      list.append(term, value);
    }
    this.content.append(list);
  }

  // Pictures that the model draws; `source` gives an address or a promise of one.
  async looks(source, before = null) {
    const kinds = this.api.set.model?.looks ?? [];
    if (!kinds.length) return;
    const title = document.createElement("h3"), box = document.createElement("div");
    title.textContent = "What the model sees";
    box.className = "looks";
    this.content.insertBefore(title, before);
    this.content.insertBefore(box, before);
    for (const kind of kinds) {
      const figure = document.createElement("figure"), image = document.createElement("img");
      const caption = document.createElement("figcaption");
      image.alt = caption.textContent = LOOKS[kind] ?? kind;
      figure.append(image, caption);
      box.append(figure);
      image.addEventListener("error", () => {
        figure.remove();
        this.api.say(`${caption.textContent} could not be drawn.`, true);
      });
      try {
        image.src = await source(kind);
      } catch (error) {
        this.api.say(error.message, true);
      }
    }
  }

  async neighbours(turn, search) {
    const title = document.createElement("h3"), box = document.createElement("div");
    title.textContent = "Looking for neighbours…";
    box.className = "neighbours";
    this.content.append(title, box);
    let answer;
    try {
      answer = await search();
    } catch (error) {
      title.textContent = "No neighbours";
      this.api.say(error.message, true);
      return null;
    }
    if (turn !== this.turn) return null;
    title.textContent = "Nearest neighbours";
    for (const row of answer.neighbours) box.append(this.neighbour(row));
    return title;
  }

  neighbour(row) {
    const button = document.createElement("button"), about = document.createElement("small");
    button.type = "button";
    button.title = [row.source, row.label, row.decision].filter(Boolean).join("\n");
    const similarity = document.createElement("b");
    similarity.textContent = row.similarity.toFixed(3);
    about.append(similarity, row.label ? ` ${row.label}` : "");
    button.append(this.picture(row, 96), about);
    button.addEventListener("click", () => this.row(row));
    return button;
  }

  key(event) {
    const buttons = [...this.content.querySelectorAll(".neighbours button")];
    const here = buttons.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && here >= 0) {
      buttons[here + step]?.focus();
      event.preventDefault();
    }
  }
}

export function nameOf(row) {
  return row.source.split("/").filter(Boolean).at(-1) || row.image_id;
}
