"""The software bill of materials, in CycloneDX's format."""

import json
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from app.version import VERSION
from supply_chain.licences import licence_of
from supply_chain.pins import Pin, pinned


def bill_of_materials() -> dict[str, Any]:
    """Return the document: every pinned package with its licence and what it depends on."""
    bom = Bom()
    whole = Component(name="winnow", version=VERSION, type=ComponentType.APPLICATION)
    bom.metadata.component = whole
    pins = {pin.key: pin for pin in pinned()}
    components = {key: _component(pin) for key, pin in pins.items()}
    for component in components.values():
        bom.components.add(component)
    bom.register_dependency(whole, components.values())
    for key, pin in pins.items():
        needed = [components[name] for name in _needs(pin) if name in components]
        bom.register_dependency(components[key], needed)
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    return document


def _component(pin: Pin) -> Component:
    component = Component(
        name=pin.name,
        version=pin.version,
        type=ComponentType.LIBRARY,
        purl=PackageURL.from_string(pin.purl),
        bom_ref=pin.purl,
    )
    if pin.distribution is not None and (licence := licence_of(pin.distribution)):
        component.licenses.add(LicenseFactory().make_from_string(licence))
    return component


def _needs(pin: Pin) -> set[NormalizedName]:
    if pin.distribution is None:
        return set()
    wanted = [Requirement(line) for line in pin.distribution.requires or []]
    return {
        canonicalize_name(one.name)
        for one in wanted
        if one.marker is None or one.marker.evaluate({"extra": ""})
    } - {canonicalize_name(pin.key)}
