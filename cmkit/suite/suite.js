"use strict";
// One number's figures at a time: all are there without this script.
const numbers = document.getElementById("numbers");

function choose() {
  const chosen = numbers.querySelector(":checked").value;
  for (const figures of document.querySelectorAll(".figures")) {
    figures.hidden = figures.dataset.number !== chosen;
  }
}

if (numbers) {
  numbers.hidden = false;
  numbers.addEventListener("input", choose);
  choose();
}
