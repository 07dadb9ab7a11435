"""What any page of ours must be, looked for in the browser's own layout and computed styles.

Every check returns what is wrong, in words; an empty list is a pass. They know nothing of the report.
"""

from typing import Any, NamedTuple


class Opened(NamedTuple):
    """A page in the browser, its messages and failures, and all that it asked for."""

    page: Any  # playwright.sync_api.Page
    complaints: list[str]
    requests: list[str]


def requests_elsewhere(opened: Opened) -> list[str]:
    """Everything asked for beside the file itself and what it carries inside."""
    return [url for url in opened.requests[1:] if not url.startswith(("data:", "blob:"))]


def figure_faults(opened: Opened) -> list[str]:
    """Figures that are not seen, have no text alternative, or share it with another."""
    return opened.page.evaluate(
        """() => {
        const figures = [...document.querySelectorAll("svg, img, canvas")], faults = [], seen = new Set();
        if (!figures.length) faults.push("no figures");
        for (const figure of figures) {
            const box = figure.getBoundingClientRect(), style = getComputedStyle(figure);
            const text = figure.getAttribute("aria-label") ?? figure.getAttribute("alt") ?? "";
            const name = text || figure.outerHTML.slice(0, 80);
            if (box.width < 50 || box.height < 50) faults.push(`${name}: ${box.width} x ${box.height}`);
            if (style.visibility !== "visible" || style.display === "none") faults.push(`${name}: hidden`);
            if (text.length < 20) faults.push(`${name}: no text alternative`);
            if (figure.tagName !== "IMG" && figure.getAttribute("role") !== "img") faults.push(`${name}: no role`);
            if (seen.has(text)) faults.push(`${name}: text alternative used twice`);
            seen.add(text);
        }
        return faults;
        }"""
    )


def contrast_faults(opened: Opened, least: float = 4.5) -> list[str]:
    """Visible text whose colour stands out less than `least` against what lies behind it (WCAG 2.2, 1.4.3)."""
    return opened.page.evaluate(
        """least => {
        const parse = text => {
            const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
            return [r, g, b, a];
        };
        const over = ([r, g, b, a], under) => [r, g, b].map((value, i) => a * value + (1 - a) * under[i]);
        const background = element => {
            const layers = [];
            for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
            return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
        };
        const luminance = colour => {
            const [r, g, b] = colour.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const faults = new Set();
        let number = 0;
        const look = (element, style, text) => {
            const behind = background(element);
            let colour = parse(element.closest("svg") ? style.fill : style.color);
            for (let e = element; e; e = e.parentElement) colour[3] *= Number(getComputedStyle(e).opacity);
            const [high, low] = [over(colour, behind), behind].map(luminance).sort((a, b) => b - a);
            const ratio = (high + 0.05) / (low + 0.05);
            number += 1;
            if (ratio < least) faults.add(`${text.trim().slice(0, 40)}: ${ratio.toFixed(2)} (${element.tagName})`);
        };
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            const element = node.parentElement, box = element.getBoundingClientRect();
            if (!node.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName) || !box.width) continue;
            look(element, getComputedStyle(element), node.data);
        }
        for (const input of document.querySelectorAll("input"))
            look(input, getComputedStyle(input, "::placeholder"), input.placeholder);
        if (!number) faults.add("no text");
        return [...faults];
        }""",
        least,
    )


def overflow_faults(opened: Opened) -> list[str]:
    """What makes the page wider than its window; what scrolls in a box of its own does not count."""
    return opened.page.evaluate(
        """() => {
        const root = document.documentElement;
        if (root.scrollWidth <= root.clientWidth) return [];
        const wide = [...document.body.querySelectorAll("*")].filter(e =>
            e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest(".drawing, .scroll"));
        return [`${root.scrollWidth} in ${root.clientWidth}`, ...wide.slice(0, 5).map(e => e.outerHTML.slice(0, 100))];
        }"""
    )


def table_and_label_faults(opened: Opened) -> list[str]:
    """Table headings without scope, inputs without a label, buttons and links without a name, no language, no title."""
    return opened.page.evaluate(
        """() => {
        const faults = [], show = e => e.outerHTML.slice(0, 100);
        for (const th of document.querySelectorAll("th")) if (!th.scope) faults.push("no scope: " + show(th));
        for (const table of document.querySelectorAll("table"))
            if (!table.querySelector("thead th")) faults.push("no headings: " + show(table));
        for (const input of document.querySelectorAll("input, select, textarea"))
            if (!input.labels.length && !input.getAttribute("aria-label")) faults.push("no label: " + show(input));
        for (const e of document.querySelectorAll("button, a"))
            if (!e.textContent.trim()) faults.push("no name: " + show(e));
        if (!document.documentElement.lang) faults.push("no language");
        if (!document.title) faults.push("no title");
        return faults;
        }"""
    )
