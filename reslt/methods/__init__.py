"""The parts of methods: costs, class weights, losses, samplers and predictors, and their choice by name."""
