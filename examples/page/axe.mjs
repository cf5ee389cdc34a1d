// A page in jsdom, with axe-core beside it. The page's own scripts do not run, so that it cannot
// answer for axe.

import { readFileSync } from "node:fs";
import axe from "axe-core";
import { JSDOM, VirtualConsole } from "jsdom";

export function open(file) {
  const { window } = new JSDOM(readFileSync(file, "utf8"), {
    runScripts: "outside-only",
    virtualConsole: new VirtualConsole(), // what jsdom cannot do is none of our lines
  });
  window.eval(axe.source);
  return window;
}
