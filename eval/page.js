// Sort the lists. Show the log-probs of the token under the pointer or the focus.
"use strict";

for (const button of document.querySelectorAll("button[data-sort]")) {
  button.addEventListener("click", () => {
    const key = button.dataset.sort, heads = button.parentElement, list = heads.nextElementSibling;
    const sign = button.dataset.order === "falling" ? 1 : -1; // first click: the largest on top
    for (const other of heads.querySelectorAll("button")) delete other.dataset.order;
    button.dataset.order = sign < 0 ? "falling" : "rising";
    list.append(...[...list.children].sort((a, b) => sign * (a.dataset[key] - b.dataset[key])));
  });
}

const readout = document.querySelector("#readout");
const signed = (value, sign = "") => (value < 0 ? "−" : sign) + Math.abs(value).toFixed(2);

function show(token) {
  readout.hidden = !token;
  if (!token) return;
  const [logp, reference] = token.dataset.l.split(",").map(Number);
  const text = token.textContent.replace("\n", "") || "↵";
  readout.textContent =
    `“${text}”\nlog π ${signed(logp)}   log π_ref ${signed(reference)}\n` +
    `difference ${signed(logp - reference, "+")}`;
  const place = token.getBoundingClientRect(), size = readout.getBoundingClientRect();
  const below = place.bottom + 8 + size.height < innerHeight;
  readout.style.left = `${Math.max(8, Math.min(place.left, innerWidth - size.width - 8))}px`;
  readout.style.top = `${below ? place.bottom + 8 : place.top - size.height - 8}px`;
}

const tokenOf = (event) => (event.target.closest ? event.target.closest("b[data-l]") : null);
document.addEventListener("pointerover", (event) => show(tokenOf(event)));
document.addEventListener("focusin", (event) => show(tokenOf(event)));
document.addEventListener("scroll", () => { readout.hidden = true; }, { passive: true });

// An answer takes the focus; then the arrow keys walk over its tokens.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") show(null);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const answer = step && event.target.closest(".answer");
  if (!answer) return;
  event.preventDefault();
  const tokens = [...answer.querySelectorAll("b[data-l]")];
  const next = tokens.indexOf(document.activeElement) + step;
  const token = tokens[Math.max(0, Math.min(next, tokens.length - 1))];
  token.tabIndex = -1;
  token.focus({ preventScroll: false });
  show(token);
});
