"use strict";
/* A token as HTML that displays this token: the page writes tokens into HTML. */
const tokenHtml = (token) => String(token).replace(/[<>"]/g, (character) => `&#${character.charCodeAt(0)};`);
