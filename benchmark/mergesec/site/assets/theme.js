"use strict";
/* Light or dark: as the system says, until the reader chooses. Loaded first, so that no page flashes. */
(() => {
  const root = document.documentElement;
  const kept = () => { try { return localStorage.getItem("mergesec-theme"); } catch { return null; } };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = () => { root.dataset.theme = kept() || (system.matches ? "dark" : "light"); };
  show();
  system.addEventListener("change", show);
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const next = root.dataset.theme === "dark" ? "light" : "dark";
      try { localStorage.setItem("mergesec-theme", next); } catch { /* then it lasts for this page */ }
      root.dataset.theme = next;
      dispatchEvent(new Event("mergesec-theme"));
    });
  });
})();
