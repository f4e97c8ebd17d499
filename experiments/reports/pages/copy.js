"use strict";
// Commands: a button that copies each of them.

function setUpCopying() {
  for (const command of document.querySelectorAll("pre.command")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "copy";
    const text = command.textContent;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch { // a page that was opened as a file may not be allowed to: the text is selected instead
        getSelection().selectAllChildren(command);
        button.textContent = "selected";
      }
    });
    command.append(button);
  }
}

setUpCopying();
