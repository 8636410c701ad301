"""The report as one self-contained page: `write.py` fills the template, `pictures.py` says where everything is drawn.

    page.html.j2     the page, from the dict of a report alone; pictures are SVG
    page.css.j2      its style, light and dark, narrow and wide, screen and paper
    page.js.j2       the time line: what is under the pointer or the keyboard, and zooming

The template escapes whatever a report holds. A content security policy in the page allows this one script and nothing
from anywhere else.
"""
