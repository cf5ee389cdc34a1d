// How many elements break a rule of axe-core, in all and by rule.

import { open } from "./axe.mjs";

const { axe, document } = open("page.html");
const rules = { "color-contrast": { enabled: false } }; // jsdom paints nothing
const { violations } = await axe.run(document, { rules });

const counts = violations.map(({ id, nodes }) => [id.replaceAll("-", "_"), nodes.length]);
for (const [rule, count] of counts.sort((a, b) => b[1] - a[1])) {
  console.log(`${rule}: ${count}`);
}
console.log(`violations: ${counts.reduce((sum, [, count]) => sum + count, 0)}`);
