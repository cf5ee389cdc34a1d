// Whether everything of `original.html` is still there for all to see and to hear: a page without
// content breaks no rule.

import { open } from "./axe.mjs";

const KINDS = [
  ["link", "a[href]", "href"],
  ["image", "img:not([alt=''], [role])", "src"], // an image without words is lost to some
  ["frame", "iframe", "src"],
  ["field", "input, select, textarea", "name"],
  ["button", "button", "type"],
];

/** The texts of a page, and what else it holds, say `link /map`. */
function read(file) {
  const { axe, document, NodeFilter } = open(file);
  axe.setup(document);
  const { isVisibleOnScreen, isVisibleToScreenReaders } = axe.commons.dom;
  const visible = (node) => isVisibleOnScreen(node) && isVisibleToScreenReaders(node);
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const { data, parentElement } = walker.currentNode;
    const text = data.replace(/\s+/g, " ").trim();
    if (text && visible(parentElement)) texts.push(text);
  }
  const things = KINDS.flatMap(([kind, selector, attribute]) =>
    [...document.querySelectorAll(selector)]
      .filter(visible)
      .map((element) => `${kind} ${element.getAttribute(attribute)}`),
  );
  return { texts, things };
}

const squeeze = (text) => text.replace(/\s+/g, "");
const times = (texts, text) => squeeze(texts.join("")).split(squeeze(text)).length;
const count = (things, thing) => things.filter((other) => other === thing).length;

const before = read("original.html");
const after = read("page.html");
const lost = [
  ...before.texts.filter((text) => times(after.texts, text) < times(before.texts, text)),
  ...before.things.filter((thing) => count(after.things, thing) < count(before.things, thing)),
];
if (lost.length) {
  console.error(`lost or hidden: ${[...new Set(lost)].join(", ")}`);
  process.exit(1);
}
